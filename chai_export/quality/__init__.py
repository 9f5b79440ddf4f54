"""Proof: verification, perplexity and agreement."""
