"""Serving on NVIDIA Triton Inference Server: a model of its Python back end around our engine."""
