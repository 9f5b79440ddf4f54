"""One layer of the oracle through the Triton kernels: what "chai" attention costs in torch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def kernels_available(device: torch.device) -> bool:
    """Whether tensors on this device can go through the kernels: CUDA, and Triton is installed."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def fresh_prefill(
    query: Tensor, key: Tensor, value: Tensor, kept: int, scale: float, probe_tokens: int
) -> tuple[Tensor, Tensor]:
    """The op over one fresh prefill, head map decided by the probe.

    Args:
        query: [B, H, S, D].
        key: [B, G, S, D].
        value: [B, G, S, Dv].
        kept: R, 1 … G.
        scale: factor on the scores.
        probe_tokens: P.

    Returns:
        Attended values [B, H, S, Dv] in the dtype of ``query``, and the head maps, int32 [B, H].
    """
    from chai_export.kernels import clustered_head_attention
    from chai_export.op.attributes import Attributes

    batch, heads, tokens, head_dim = query.shape
    groups, value_dim = key.shape[1], value.shape[3]
    past_lengths = torch.zeros(batch, dtype=torch.int32, device=query.device)
    result = clustered_head_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        query.new_empty(batch, kept, tokens, head_dim),  # a page for each row
        query.new_empty(batch, groups, tokens, value_dim),
        None,
        None,
        torch.arange(batch, dtype=torch.int32, device=query.device)[:, None],
        past_lengths.new_zeros(batch, heads),
        past_lengths,
        past_lengths + tokens,
        attributes=Attributes(scale=scale, probe_tokens=probe_tokens),
    )
    attended = result.output.view(batch, tokens, heads, value_dim).transpose(1, 2)
    return attended, result.present_head_map
