"""A rotary embedding is one node whatever the dtype, and computes what it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from chai_export.exporter.rotary_casts import rotary_casts
from chai_export.exporter.torch_export import trace
from tests.helpers.families import family_model

torch = pytest.importorskip("torch")


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_models_of_any_dtype_have_one_node_for_each_rotary_embedding(dtype: str) -> None:
    model = trace(family_model("llama-gqa").to(getattr(torch, dtype)), opset=23, attention="sdpa")
    assert operators(model).count("RotaryEmbedding") == 2 * 2
    assert "Neg" not in operators(model)
    for node in model.graph:
        if node.op_type == "RotaryEmbedding" and dtype != "float32":
            rounded = ["Cast", getattr(ir.DataType, {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype])]
            for factor in node.inputs[1:]:
                cast = factor.producer()
                assert [cast.op_type, ir.DataType(cast.attributes["to"].as_int())] == rounded


def by_hand(read_exactly: bool) -> ir.Model:
    """Cos of a float32 input, rounded to float16 and read by Neg; its exact value may be an output too."""
    text = """<ir_version: 10, opset_import: ["" : 23]> g (float[4] x) => (float16[4] y%s) {
        c = Cos (x)
        r = Cast <to = 10> (c)
        y = Neg (r)
        %s
    }""" % ((", float[4] z", "z = Neg (c)") if read_exactly else ("", ""))
    return ir.from_onnx_text(text)


@pytest.mark.parametrize("read_exactly", [False, True])
def test_what_is_not_fused_keeps_its_cast_and_what_was_exact_stays_so(read_exactly: bool) -> None:
    x = np.linspace(-3, 3, 4, dtype=np.float32)

    def run(model: ir.Model) -> list[np.ndarray]:
        return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})

    model = by_hand(read_exactly)
    expected = run(model)
    with rotary_casts(model):
        assert "Cast" not in [node.op_type for node in model.graph if node.outputs[0].uses()]
    assert operators(model).count("Cast") == 1
    for got, wanted in zip(run(model), expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
