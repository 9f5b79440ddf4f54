"""GPU kernels of version 2 of the op: pages, quantised rows, windows, soft caps, sinks and slopes."""
