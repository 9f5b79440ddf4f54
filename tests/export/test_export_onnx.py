"""The front end: names, shapes and types of the exported graph, and what it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.exporter.lazy_transpose import fold_weight_transposes
from chai_export.exporter.torch_export import export_onnx, trace
from tests.helpers.exported import exported, model_of
from tests.helpers.families import family_model

NAME = "llama-gqa"


def test_inputs_and_outputs_have_their_documented_names_and_shapes() -> None:
    graph = ir.load(exported(NAME)).graph
    inputs = {value.name: [str(dim) for dim in value.shape] for value in graph.inputs}
    caches = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids", *caches}
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "tokens"]
    assert all(inputs[name] == ["batch", "2", "past", "8"] for name in caches)
    presents = [name.replace("past_key_values", "present") for name in caches]
    assert [value.name for value in graph.outputs] == ["logits", *presents]


def test_logits_equal_the_model_with_a_past() -> None:
    session = ort.InferenceSession(str(exported(NAME)), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 96, (2, 7), generator=generator)
    caches = {
        f"past_key_values.{i}.{p}": np.zeros((2, 2, 0, 8), np.float32)
        for i in (0, 1)
        for p in ("key", "value")
    }
    logits = []
    for start, end in ((0, 4), (4, 7)):
        positions = np.arange(start, end, dtype=np.int64)[None].repeat(2, 0)
        feeds = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": np.ones((2, end), np.int64),
            "position_ids": positions,
            **caches,
        }
        result, *presents = session.run(None, feeds)
        caches = dict(zip(caches, presents, strict=True))
        logits.append(result)
    with torch.no_grad():
        expected = model_of(NAME)(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(np.concatenate(logits, 1), expected, atol=1e-4)


def test_the_default_opset_has_fused_operators() -> None:
    ops = {node.op_type for node in ir.load(exported(NAME)).graph}
    assert {"Attention", "RotaryEmbedding", "RMSNormalization"} <= ops


def test_weights_lie_outside_in_the_layout_that_matmul_reads() -> None:
    model = ir.load(exported(NAME))
    large = [
        v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size > 256
    ]
    assert all(isinstance(value.const_value, ir.ExternalTensor) for value in large)
    for node in model.graph:
        assert node.op_type != "Transpose" or not node.inputs[0].is_initializer()


def test_a_weight_that_is_read_in_both_layouts_is_kept_once() -> None:
    """Tied embeddings: gathered as they are, multiplied transposed."""
    weight = ir.Value(name="w", const_value=ir.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3), name="w"))
    weight.shape, weight.type = ir.Shape([2, 3]), ir.TensorType(ir.DataType.FLOAT)
    ids = ir.Value(name="ids", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [weight, ids])
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]})
    product = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]])
    graph = ir.Graph(
        [ids],
        product.outputs,
        nodes=[gather, transpose, product],
        initializers=[weight],
        opset_imports={"": 20},
    )
    assert fold_weight_transposes(ir.Model(graph, ir_version=10)) == 0
    assert [node.op_type for node in graph] == ["Gather", "Transpose", "MatMul"]
    assert list(graph.initializers) == ["w"]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = family_model("gpt2", n_layer=1)
    before = model.config._attn_implementation
    with pytest.raises(ChaiError, match="opset 3 is not supported"):
        export_onnx(model, tmp_path, opset=3)
    assert model.config._attn_implementation == before


def test_a_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    class NoCache(torch.nn.Module):
        dtype = torch.float32

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return input_ids

    with pytest.raises(ChaiError, match="no key/value cache"):
        export_onnx(NoCache(), tmp_path)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_traced_is_one_line_and_not_its_graph(capfd, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        print("def forward(self):\n" * 482, file=sys.stderr)
        raise RuntimeError("Could not guard on data-dependent expression\n\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ChaiError, match=r"cannot trace LlamaForCausalLM at opset 23 \(Could not") as caught:
        trace(family_model("llama-mha"), opset=23, attention="sdpa")
    assert "\n" not in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
