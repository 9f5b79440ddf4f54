"""Building engines from a bundle, one module per backend."""
