"""Words that a bundle, its engines and whoever runs them choose from."""

from __future__ import annotations

from chai_export.choice import Choice


class Heads(Choice):
    """How many KV heads the K cache of a layer has: the kept ones, or all, which makes attention plain."""

    CHAI = "chai"
    ALL = "all"


class Backend(Choice):
    """What runs a bundle."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class Membership(Choice):
    """When head maps are decided: by each sequence, or once, at export."""

    ONLINE = "online"
    STATIC = "static"


class SourceKind(Choice):
    """Where a model came from: Hugging Face, or another exporter's ONNX graph."""

    HF = "hf"
    ONNX = "onnx"
