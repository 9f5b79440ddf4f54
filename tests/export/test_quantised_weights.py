"""`export --weights`: what is stored, what it computes, and what `verify` catches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from chai_export.bundle.bundle import Bundle, finalise
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError, UsageError
from chai_export.exporter.stage import export
from chai_export.graph.weights.block_weight import named_block_weight
from chai_export.quality.verify import verify
from chai_export.runtime.runner import load
from tests.helpers.exported import kept_of, model_of, scratch

LLAMA, QWEN, GPT2 = "llama-gqa", "qwen2-gqa", "gpt2"


def bundle_with(name: str, **options: object) -> Bundle:
    place = scratch() / "-".join(["weights", name, *map(str, options.values())])
    if not place.exists():
        export(model_of(name), Clusters(kept_of(name)), place, **options)
    return Bundle.load(place)


def changed(bundle: Bundle, place: Path, part: str, change: Callable[[np.ndarray], None]) -> Bundle:
    """The bundle with another array in the place of one initializer."""
    shutil.copytree(bundle.path, place)
    model = ir.load(place / "model.onnx")
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy().copy()
        if name.endswith(part):
            change(array)
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    for file in ("model.onnx", "model.onnx.data"):
        (place / file).unlink(missing_ok=True)
    ir.save(model, place / "model.onnx", external_data="model.onnx.data")
    finalise(place, bundle.manifest)
    return Bundle.load(place)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (LLAMA, {"weights": "int4"}),
        (QWEN, {"weights": "int8", "key_bits": 8, "value_bits": 4}),
        pytest.param(
            QWEN, {"weights": "int4", "dtype": "float16", "weight_method": "hqq"}, marks=pytest.mark.slow
        ),
        pytest.param(GPT2, {"weights": "int4", "quantise_head": False}, marks=pytest.mark.slow),
    ],
)
def test_a_quantised_bundle_is_its_model_with_the_numbers_of_the_codes(name, options):
    bundle = bundle_with(name, **options)
    assert bundle.manifest.weights == options["weights"]
    result = verify(bundle.path, model_of(name), new_tokens=4)
    assert result.ok
    assert result.weights.type == options["weights"]
    assert 0.5 < result.weights.farthest <= 1.0
    layers = {LLAMA: 2 * 7, QWEN: 7, GPT2: 2 * 4}
    assert result.weights.matrices == layers[name] + options.get("quantise_head", True)
    # What runs has 8-bit activations, whose distance is told.
    assert 0.0 < result.distance_to_exact["all"]["kl"] < 0.1


def test_the_model_that_verify_was_given_keeps_its_weights():
    model = model_of(LLAMA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verify(bundle_with(LLAMA, weights="int4").path, model, new_tokens=2)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_matrices_have_their_names_and_their_floats_are_gone():
    bundle = bundle_with(LLAMA, weights="int4")
    graph = ir.load(bundle.model_path).graph
    found = dict(filter(None, map(named_block_weight, graph)))
    assert len(found) == 15
    assert not any(node.op_type in ("MatMul", "Gemm") for node in graph)
    parameters = dict(model_of(LLAMA).named_parameters(remove_duplicate=False))
    assert {name: weight.bits for name, weight in found.items() if weight.bits != 4} == {"lm_head.weight": 8}
    for name, weight in found.items():
        away = np.abs(parameters[name].detach().numpy() - weight.dequantised())
        assert away.max() <= weight.scales.max()
    whole = 4 * sum(parameter.numel() for parameter in model_of(LLAMA).parameters())
    assert bundle.manifest.files["model.onnx.data"].size < 0.6 * whole  # the embedding stays as it is
    generation = load(bundle.path).generate([[3, 1, 4, 1, 5]], max_new_tokens=4, ignore_eos=True)[0]
    assert len(generation.token_ids) == 4


def larger_scales(array: np.ndarray) -> None:
    array.reshape(-1)[:8] *= 1.2


def another_code(array: np.ndarray) -> None:
    array.reshape(-1)[0] ^= 0x11


def exchanged_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("0.self_attn.q_proj.weight.scales", larger_scales),
        ("1.mlp.down_proj.weight.blocks", another_code),
        ("0.mlp.up_proj.weight.zero_points", another_code),
        ("1.self_attn.v_proj.weight.blocks", exchanged_rows),
    ],
)
def test_verify_finds_codes_that_are_not_the_nearest(part, change, tmp_path):
    wrong = changed(bundle_with(LLAMA, weights="int4"), tmp_path / "wrong", part, change)
    result = verify(wrong.path, model_of(LLAMA), new_tokens=2)
    assert not result.ok
    assert result.weights.farthest > 1.0
    assert result.weights.worst == f"model.layers.{part.rpartition('.')[0]}"


def test_verify_finds_a_mistake_beside_the_weights(tmp_path):
    bundle = bundle_with(LLAMA, weights="int4")
    wrong = changed(bundle, tmp_path / "wrong", "0.input_layernorm.weight", larger_scales)
    result = verify(wrong.path, model_of(LLAMA), new_tokens=2)
    assert result.weights.farthest <= 1.0
    assert not result.ok
    assert result.tolerance_used["all"] > 3.0


def test_another_model_is_refused_by_the_matrix():
    with pytest.raises(ChaiError, match="give the model that the bundle was made from"):
        verify(bundle_with(LLAMA, weights="int4").path, model_of(GPT2), new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "weight type is 'int3'"),
        ({"weights": "int4", "weight_block": 48}, "--weight-block is 48"),
        ({"weights": "int4", "weight_method": "awq"}, "method is 'awq'"),
        ({"weights": "int4", "dtype": "bfloat16"}, "--dtype float32 or float16"),
        ({"weights": "int8", "membership": "static", "text": "a"}, "--membership online"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "nothing", None, tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []
