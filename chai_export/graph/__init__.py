"""The rewrite of an ONNX decoder: find attention, prove it, replace it with ClusteredHeadAttention nodes."""
