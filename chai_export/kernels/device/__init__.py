"""Device code: one Triton kernel family per module, launched by :mod:`chai_export.kernels.launch`."""
