"""Read an ONNX file and bring it into the one form that the rest relies on."""
