"""Attention that the op cannot express is refused, with the layer and the reason, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig
from transformers.models.falcon import modeling_falcon

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.exporter.torch_export import export_onnx
from chai_export.graph.stage import explain, rewrite

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
SUPPORTED = modeling_falcon.build_alibi_tensor


def uneven(*given: Any, **options: Any) -> torch.Tensor:
    """A bias that grows faster from key to key."""
    return SUPPORTED(*given, **options) ** 2


def first_keys_only(*given: Any, **options: Any) -> torch.Tensor:
    """A bias that is ALiBi's at the first keys."""
    return SUPPORTED(*given, **options).clamp(max=5.0)


def alibi_in_float32(mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Falcon's of four heads as the paper has it."""
    slopes = torch.tensor([2.0 ** (-2 * (head + 1)) for head in range(num_heads)])
    places = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]
    return (slopes[:, None] * places).reshape(len(mask) * num_heads, 1, mask.shape[1]).to(dtype)


@pytest.mark.parametrize("bias", [uneven, first_keys_only])
def test_a_bias_that_is_no_alibi_is_refused_by_layer_and_reason(
    bias: Callable[..., torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", bias)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FalconConfig(**SIZES, alibi=True)).float().eval()
    source = tmp_path / "source"
    source.mkdir()
    path = export_onnx(model, source, opset=18, attention="eager")
    with pytest.raises(ChaiError, match=r"layer 0.*a bias is added to the scores") as caught:
        rewrite(path, Clusters((1,)), tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    explanation = explain(path)
    assert not explanation.rewritable
    assert "a bias is added" in explanation.verdict
    assert "a bias is added" in explanation.rows()[0][-1]


@pytest.mark.parametrize(
    ("alibi", "dtype", "refused"),
    [
        (SUPPORTED, torch.float32, True),
        (alibi_in_float32, torch.float32, False),
        (SUPPORTED, torch.bfloat16, False),
    ],
    ids=["transformers' own in float32", "float32 throughout", "bfloat16 throughout"],
)
def test_alibi_of_fewer_digits_than_the_graph_is_refused(
    alibi: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers computes Falcon's in bfloat16 whatever the model's type; the proof runs in float32."""
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", alibi)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FalconConfig(**SIZES, alibi=True)).to(dtype).eval()
    (tmp_path / "source").mkdir()
    path = export_onnx(model, tmp_path / "source", opset=18, attention="eager")
    explanation = explain(path)
    assert explanation.rewritable is not refused, explanation.verdict
    if refused:
        with pytest.raises(ChaiError, match=r"layer 0.*ALiBi is computed in bfloat16, which makes its steps"):
            rewrite(path, Clusters((1,)), tmp_path / "bundle")
    else:
        assert ", ALiBi; mask causal" in explanation.rows()[0][-1]
