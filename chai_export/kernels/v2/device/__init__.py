"""Device code of version 2 of the op: everything here is Triton and runs on the GPU."""
