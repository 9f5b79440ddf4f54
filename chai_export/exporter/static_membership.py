"""Static membership: head maps fixed at export, and the projections of heads that are never used cut away.

The paper's CHAI-static. With one map per layer for every sequence, the query rows of heads that do not
represent anyone and the key rows of KV heads that are not kept are never read: unlike the dynamic way, it
saves weights and multiplications as well as cache. It pays with maps that do not follow the sequence and
with first tokens that are no longer exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chai_export.bundle.manifest import StaticMembership
from chai_export.clustering.static_maps import static_head_maps
from chai_export.errors import ChaiError
from chai_export.models.geometry import describe
from chai_export.models.oracle import Oracle
from chai_export.models.text import leading_special_tokens, read_tokens
from chai_export.op.head_map import kept_kv_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.manifest import StaticMembership
    from chai_export.clustering.plan import Chosen
    from chai_export.models.text import Text

_TOLERANCE = 1e-3
_WINDOWS, _TOKENS, _SPACING = 32, 64, 16


@dataclass(frozen=True)
class Savings:
    """What was cut away.

    Attributes:
        parameters: of the query and key projections, no longer stored.
        parameters_before: of the whole model.
        flops_per_token: multiplications and additions no longer done for each token.
    """

    parameters: int
    parameters_before: int
    flops_per_token: int


class SlicedProjection(nn.Module):
    """A projection that computes some heads and copies them to the places of the others.

    Args:
        linear: the whole projection, out_features = heads · head_dim.
        source: int [heads], which head each place shows; only these are stored and computed.
        head_dim: width of a head.
    """

    columns: Tensor

    def __init__(self, linear: nn.Linear, source: NDArray[np.integer[Any]], head_dim: int) -> None:
        super().__init__()
        stored = np.unique(source)
        within = np.arange(head_dim)
        rows = torch.from_numpy((stored[:, None] * head_dim + within).reshape(-1))
        place = np.searchsorted(stored, source)
        self.weight = nn.Parameter(linear.weight.detach()[rows].clone(), requires_grad=False)
        self.bias = (
            None
            if linear.bias is None
            else nn.Parameter(linear.bias.detach()[rows].clone(), requires_grad=False)
        )
        self.register_buffer("columns", torch.from_numpy((place[:, None] * head_dim + within).reshape(-1)))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden size] to [..., heads · head_dim]."""
        return nn.functional.linear(hidden, self.weight, self.bias).index_select(-1, self.columns)


def slice_projections(model: PreTrainedModel, head_maps: NDArray[np.int32]) -> Savings:
    """Cut the projections of unused heads out of a model, in place.

    Args:
        model: a supported decoder with separate query and key projections.
        head_maps: int32 [L, H].

    Raises:
        ChaiError: its projections are fused, or heads depend on each other before their scores (a norm over
            all heads), so that cutting one would change the rest.
    """

    geometry = describe(model.config)
    layers = [module for module in model.modules() if _has_projections(module)]
    if len(layers) != geometry.num_layers:
        raise ChaiError(
            f"{geometry.model_type} computes queries and keys in one projection, which cannot be cut by "
            "heads yet; use --membership online"
        )
    before = sum(parameter.numel() for parameter in model.parameters())
    tokens = [(7 * index + 3) % geometry.vocab_size for index in range(12)]
    kept = [len(kept_kv_heads(head_map, geometry.group)) for head_map in head_maps]
    expected = Oracle(model, kept, online=False).logits(tokens, head_maps)
    for module, head_map in zip(layers, head_maps, strict=True):
        owners = np.array(kept_kv_heads(head_map, geometry.group))
        # Keys that are not kept are never read; the first kept one stands in their place.
        keys = np.where(
            np.isin(np.arange(geometry.num_kv_heads), owners), np.arange(geometry.num_kv_heads), owners[0]
        )
        module.q_proj = SlicedProjection(module.q_proj, head_map, geometry.head_dim)
        module.k_proj = SlicedProjection(module.k_proj, keys, geometry.head_dim)
    got = Oracle(model, kept, online=False).logits(tokens, head_maps)
    worst = float(np.abs(got - expected).max())
    if not worst <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ChaiError(
            f"cutting the projections changes this {geometry.model_type} model (logits differ by "
            f"{worst:.2g}): its heads depend on each other before their scores; use --membership online"
        )
    saved = before - sum(parameter.numel() for parameter in model.parameters())
    return Savings(saved, before, 2 * saved)


def _has_projections(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj"))


def choose_and_slice(
    model: PreTrainedModel, clusters: Chosen, text: Text | Iterable[Text], tokenizer: Any | None
) -> StaticMembership:
    """Decide head maps on a text and cut ``model`` to them, in place.

    Args:
        model: a supported decoder.
        clusters: R of each layer.
        text: calibration text; 32 starts of sequences of 64 tokens are taken from it.
        tokenizer: of the model, if the text is not token ids.

    Raises:
        ChaiError: the text is too short, or the model cannot be cut.
    """

    leading = leading_special_tokens(tokenizer)
    fresh = _TOKENS - len(leading)
    tokens = read_tokens(text, tokenizer, _WINDOWS * fresh * _SPACING)
    count = min(_WINDOWS, len(tokens) // fresh)
    if count == 0:
        raise ChaiError(f"the text has {len(tokens)} tokens, static maps need {fresh}; give more with --text")
    starts = np.linspace(0, len(tokens) - fresh, count).astype(int)
    windows = np.stack([np.concatenate([leading, tokens[start : start + fresh]]) for start in starts])
    head_maps = static_head_maps(model, windows.astype(np.int32), clusters.kept_heads)
    saved = slice_projections(model, head_maps)
    return StaticMembership(
        head_maps=head_maps.tolist(),
        parameters_saved=saved.parameters,
        parameters_before=saved.parameters_before,
        flops_saved_per_token=saved.flops_per_token,
    )


def fix_head_maps(path: Path, head_maps: NDArray[np.int32]) -> None:
    """Make a bundle's graph use given maps for every row: constants in the place of the input ``head_map``.

    The input stays, so that every runner feeds the graph as before; nothing reads it.

    Args:
        path: model.onnx with external data, changed in place.
        head_maps: int32 [L, H].
    """
    import onnx
    from onnx import helper, numpy_helper

    from chai_export.op.schema import DOMAIN, OP_TYPE, signature

    model = onnx.load(str(path), load_external_data=False)
    names = signature(OP_TYPE).input_names
    graph = model.graph
    nodes: list[Any] = []
    graph.initializer.append(
        numpy_helper.from_array(np.array([head_maps.shape[1]], np.int64), "static_heads")
    )
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            layer = int(node.input[names.index("key_cache")].rsplit(".", 1)[1])
            name = f"static_head_map.{layer}"
            graph.initializer.append(numpy_helper.from_array(head_maps[layer][None], name))
            lengths = node.input[names.index("past_lengths")]
            nodes += [
                helper.make_node("Shape", [lengths], [f"{name}.batch"]),
                helper.make_node("Concat", [f"{name}.batch", "static_heads"], [f"{name}.shape"], axis=0),
                helper.make_node("Expand", [name, f"{name}.shape"], [f"{name}.rows"]),
            ]
            node.input[names.index("past_head_map")] = f"{name}.rows"
            next(attribute for attribute in node.attribute if attribute.name == "online").i = 0
        nodes.append(node)
    needed = {output.name for output in graph.output}
    kept: list[Any] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    onnx.save(model, str(path))
