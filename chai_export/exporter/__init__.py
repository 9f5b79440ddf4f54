"""From a Hugging Face model to an ONNX graph with separate past and present caches."""
