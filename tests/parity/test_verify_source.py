"""`verify --reference FILE.onnx`: right bundles pass, whatever rounds in them, and single mistakes do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.cli.main import main
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph.stage import rewrite
from chai_export.quality.verdict import VerifyResult
from chai_export.quality.verify import verify
from tests.helpers import onnx_variants as variants
from tests.helpers.graph_mistakes import (
    exchanged_queries,
    exchanged_values,
    larger_scores,
    late_positions,
    other_layer,
    other_weights,
    with_mistake,
    wrong_head_map,
)
from tests.helpers.onnx_fixtures import ALL, Fixture

BY_NAME = {fixture.name: fixture for fixture in ALL}
TORCH, INT4 = "A-torch-2.13.0-opset18-sdpa-gqa", "G-genai-0.18.0-cpu-int4-mha"
ROUNDING = {"G-genai-0.18.0-cpu-int4-gqa", INT4, "I-genai-0.18.0-cpu-fp16-gqa"}
RIGHT = (
    TORCH,
    "E-torch-2.13.0-static-cache-gqa",
    "F-optimum-0.1.0-gqa",
    "H-genai-0.18.0-dml-fp16-gqa-longrope",
    "K-handmade-onnx-1.23.2-opset24-tensorscatter-gqa",
    "J-genai-0.18.0-cpu-fp32-window",
    "J-genai-0.18.0-cpu-fp32-int8-cache",
    *sorted(ROUNDING),
)


def made_from(path: Path, fixture: Fixture, folder: Path, **options: int) -> Bundle:
    kept = [max(1, fixture.kv_heads // 2)] * fixture.layers
    return rewrite(path, Clusters(kept), folder / "bundle", **options)


def verified(bundle: Bundle, source: Path) -> VerifyResult:
    return verify(bundle.path, source, new_tokens=10)


def used(result: VerifyResult) -> dict[str, float]:
    return {gate.name: gate.tolerance_used for gate in result.gates}


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    fixture = BY_NAME[INT4]
    return made_from(fixture.path, fixture, tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A bundle of quantize_dynamic's file, and the file."""
    folder, fixture = tmp_path_factory.mktemp("dynamic"), BY_NAME[TORCH]
    path = variants.dynamic_int8(fixture.path / "model.onnx", folder / "model.onnx")
    return made_from(path, fixture, folder), path


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_bundle_passes(name: str, tmp_path: Path) -> None:
    fixture = BY_NAME[name]
    result = verified(made_from(fixture.path, fixture, tmp_path), fixture.path)
    assert result.ok
    assert result.head_map_agreement == 1.0
    rounds = any(kind in name for kind in ("int4", "fp16", "int8-cache"))
    wanted = {"exact", "chai"} | ({"as written"} if rounds else set())
    assert set(used(result)) == wanted
    assert all(0.0 < share <= 1.0 for share in used(result).values())
    # What is exact is compared as float32, whatever rounds besides.
    exact = next(gate for gate in result.gates if gate.name == "exact")
    assert exact.max_abs_logit_diff <= exact.tolerance <= 1e-3
    assert all(boundary.crossed for boundary in result.boundaries)


def test_a_dynamically_quantised_file_has_a_gate(dynamic: tuple[Bundle, Path]) -> None:
    result = verified(*dynamic)
    assert result.ok
    gates = {gate.name: gate for gate in result.gates}
    # Activations in 8 bits move logits a thousand times as far as float32 does.
    assert gates["as written"].tolerance > 100 * gates["exact"].tolerance


@pytest.mark.parametrize(
    "change",
    [
        variants.merged,
        variants.int32_inputs,
        variants.half_inside,
        lambda source, target: variants.last_token(source, target, "gather"),
        lambda source, target: variants.fix_token_ids(source, target, (1, None)),
    ],
    ids=["merged decoder", "int32 inputs", "keep_io_types", "last token", "one row"],
)
def test_files_with_other_interfaces_are_fed_as_they_want(change: Callable, tmp_path: Path) -> None:
    fixture = BY_NAME[TORCH]
    path = change(fixture.path / "model.onnx", tmp_path / "changed.onnx")
    assert verified(made_from(path, fixture, tmp_path), path).ok


MISTAKES = [larger_scores, exchanged_queries, exchanged_values, wrong_head_map, late_positions, other_weights,
            other_layer]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_an_int4_bundle_is_caught(mistake: Callable, int4: Bundle, tmp_path: Path) -> None:
    result = verified(with_mistake(int4, tmp_path / "changed", mistake), BY_NAME[INT4].path)
    assert not result.ok
    assert used(result)["exact"] > 3.0


@pytest.mark.parametrize("mistake", [larger_scores, exchanged_values], ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_dynamically_quantised_bundle_is_caught(
    mistake: Callable, dynamic: tuple[Bundle, Path], tmp_path: Path
) -> None:
    bundle, source = dynamic
    result = verified(with_mistake(bundle, tmp_path / "changed", mistake), source)
    assert not result.ok
    assert used(result)["exact"] > 3.0


def test_the_same_edit_without_a_mistake_passes(int4: Bundle, tmp_path: Path) -> None:
    assert verified(with_mistake(int4, tmp_path / "changed", lambda model: None), BY_NAME[INT4].path).ok


def test_an_op_that_is_not_its_definition_is_caught(int4: Bundle, tmp_path: Path, monkeypatch) -> None:
    """The compiled op gets another scale than the body: only the gate of CHAI can see it."""
    from chai_export.quality import verify_source

    opened = verify_source._runner

    def runner(bundle, heads, graph, *, native=True):
        if not native:
            model = onnx.load_from_string(graph.data)
            larger_scores(model)
            graph = type(graph)(model.SerializeToString(), graph.directory, graph.weights)
        return opened(bundle, heads, graph, native=native)

    monkeypatch.setattr(verify_source, "_runner", runner)
    result = verified(int4, BY_NAME[INT4].path)
    assert not result.ok
    assert used(result)["chai"] > 3.0
    assert used(result)["exact"] <= 1.0


def test_caches_in_fewer_bits_are_a_distance_and_no_mistake(tmp_path: Path) -> None:
    fixture = BY_NAME[INT4]
    bundle = made_from(fixture.path, fixture, tmp_path, key_bits=8, value_bits=4)
    result = verified(bundle, fixture.path)
    assert result.ok
    assert set(used(result)) == {"exact", "chai"}
    assert "fewer bits" in result.not_compared["as written"]
    assert result.distance_to_exact["all"]["kl"] > 0.0


def test_another_model_is_refused(int4: Bundle) -> None:
    other = next(f for f in ALL if f.kv_heads != BY_NAME[INT4].kv_heads and f.name.startswith("G-"))
    with pytest.raises(ChaiError, match=r"num_kv_heads .* give the file that the bundle was made from"):
        verified(int4, other.path)


def test_the_command_says_what_was_compared(int4: Bundle, capsys: pytest.CaptureFixture) -> None:
    source = str(BY_NAME[INT4].path / "model.onnx")
    assert main(["verify", str(int4.path), "--reference", source, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [gate["name"] for gate in report["gates"]] == ["exact", "as written", "chai"]
    assert report["greedy_match"] == {"all": True, "chai": None}
    assert main(["verify", str(int4.path), "--reference", source]) == 0
    shown = capsys.readouterr().out
    assert "the file as it is, fed alike" in shown
    assert shown.endswith("verified\n")
