"""How far rounding alone moves a model's logits: what a comparison of two right computations must allow.

The reference is run once more with the rounding errors of the bundle's dtype put into every module's inputs
and outputs. What that moves at a position says how sensitive the model is there, outliers included; no
formula of depth, width and scale does (docs/verification.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ALLOWANCE = 8.0
"""Allowed difference in units of what simulated rounding moves. Real engines took up to 4.1, most below 2."""

STORED_ALLOWANCE = 3.0
"""Likewise for what rows that lie between two stored numbers move, when each goes the other way."""

TIES = 2.0**-10
"""How close to the middle of two stored numbers a row may lie to go either way, in their distance."""

_SEED = 20240312
_UNIT_ROUNDOFF = 2.0**-24


def tolerances(plain: NDArray[np.float32], rounded: NDArray[np.float32]) -> NDArray[np.float64]:
    """The largest right difference at each position, from logits [T, V] without and with rounding: [T].

    A position counts as at least as sensitive as the median one, since a single draw may come out small, and
    a bound is never below what float32 resolves at the size of the logits.
    """
    moved = np.abs(rounded.astype(np.float64) - plain).max(axis=-1)
    resolved = float(np.finfo(np.float32).eps) * np.abs(plain).max(axis=-1)
    result: NDArray[np.float64] = ALLOWANCE * np.maximum(np.maximum(moved, np.median(moved)), resolved)
    return result


def stored_tolerances(
    plain: NDArray[np.float32], rounded: NDArray[np.float32], exact: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The same for a model whose cache rounds rows.

    A row between two stored numbers goes one way or the other by the last bit, and that moves logits far
    more than the bit itself, so a single draw of small errors says little. In ``rounded`` all rows near the
    middle went the other way (``TIES``). ``exact`` are the tolerances with a cache that rounds nothing.
    """
    moved = np.abs(rounded.astype(np.float64) - plain).max(axis=-1)
    result: NDArray[np.float64] = exact + STORED_ALLOWANCE * np.maximum(moved, np.median(moved))
    return result


@contextmanager
def rounding(model: PreTrainedModel, dtype: str) -> Iterator[None]:
    """Make a float32 model round as one of ``dtype`` would, the same in every call.

    float16 and bfloat16: inputs of leaf modules and outputs of all modules, the residual stream among them,
    are rounded to it. float32: they get errors of the size that another order of summation makes, which
    goes with the size of the row and not with that of the single number.
    """
    import torch

    generators: dict[torch.device, torch.Generator] = {}

    def perturbed(value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.dim() < 2:
            return value
        if dtype != "float32":
            target = getattr(torch, dtype)
            limits = torch.finfo(target)
            return value.clamp(limits.min, limits.max).to(target).to(value.dtype)
        generator = generators.setdefault(value.device, torch.Generator(device=value.device))
        size = value.square().mean(dim=-1, keepdim=True).sqrt() * _UNIT_ROUNDOFF
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
        return torch.addcmul(value, size, noise)

    def outputs(module: Any, given: Any, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(perturbed(item) if isinstance(item, torch.Tensor) else item for item in result)
        return perturbed(result) if isinstance(result, torch.Tensor) else result

    def inputs(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(perturbed(item) if isinstance(item, torch.Tensor) else item for item in given)

    def restart(module: Any, given: Any) -> None:
        for device in {parameter.device for parameter in model.parameters()}:
            generators[device] = torch.Generator(device=device).manual_seed(_SEED)

    hooks = [model.register_forward_pre_hook(restart)]
    for module in model.modules():
        if module is model:
            continue
        hooks.append(module.register_forward_hook(outputs))
        if next(module.children(), None) is None:
            hooks.append(module.register_forward_pre_hook(inputs))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
