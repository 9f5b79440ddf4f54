"""Serving: many users, one cache."""
