"""Recipes: all stages of a model in one file, run again only where something changed."""
