"""The offline phase: how many KV heads each layer keeps."""
