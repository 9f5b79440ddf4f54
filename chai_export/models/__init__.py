"""Hugging Face models: loading, geometry, what is supported, and the torch oracle."""
