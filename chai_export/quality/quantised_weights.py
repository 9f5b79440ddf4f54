"""Weights that `export` quantised: are they the model's, and what does the model compute with them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError
from chai_export.graph.prove.exact_activations import exact_activations
from chai_export.graph.prove.in_memory import in_memory
from chai_export.graph.read.load import read_model
from chai_export.graph.weights.block_weight import COLUMNS, BlockWeight, named_block_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.runtime.onnxruntime_model import GraphInMemory

FARTHEST_CODE = 0.51
"""Steps between a number and its code. Half a step is the nearest code; the rest is the rounding of scales to
float32, and of float16's to one part in 2,048, which is 0.13 of a step at code 255."""
_FARTHEST_IN_HALF = {4: 0.52, 8: 0.65}


@dataclass(frozen=True)
class WeightsChecked:
    """The matrices of a bundle beside those of its model.

    Attributes:
        type: "int4" or "int8".
        matrices: how many were compared.
        farthest: largest distance of a number from its code, in units of what is allowed; right up to 1.
        worst: the matrix where that is.
    """

    type: str
    matrices: int
    farthest: float
    worst: str


def take_quantised_weights(model: PreTrainedModel, bundle: Bundle) -> WeightsChecked:
    """Give ``model`` the numbers that the bundle's codes stand for, in place, if they are its own, rounded.

    Every number must lie within half a step of its code, or beyond the last one.

    Raises:
        ChaiError: a matrix of the bundle is none of the model, or has another shape.
    """
    farthest, worst, taken = 0.0, "", set()
    for node in read_model(bundle.model_path).graph:
        found = named_block_weight(node)
        if found is None or found[0] in taken:
            continue
        name, weight = found
        taken.add(name)
        distance = _exchange(model, name, weight)
        if distance >= farthest:
            farthest, worst = distance, name
    if not taken:
        raise ChaiError(f"{bundle.path} names none of its weights; export it again")
    return WeightsChecked(str(bundle.manifest.weights), len(taken), farthest, worst)


def exact_activations_of(bundle: Bundle) -> GraphInMemory:
    """The bundle's graph with products whose activations are not quantised."""
    model = read_model(bundle.model_path)
    exact_activations(model)
    return in_memory(model)


def _exchange(model: PreTrainedModel, name: str, weight: BlockWeight) -> float:
    import torch

    by_column = name.endswith(f".{COLUMNS}")
    path, _, attribute = name.removesuffix(f".{COLUMNS}").rpartition(".")
    other = "give the model that the bundle was made from with --reference"
    try:
        module: Any = model.get_submodule(path)
        parameter = getattr(module, attribute)
    except AttributeError:
        raise ChaiError(f"the bundle has a matrix {name} and the reference model none; {other}") from None
    head: Any = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is parameter:
        module, attribute = head, "weight"  # a tied embedding keeps its floats
    matrix = parameter.detach().float().numpy()
    matrix = matrix.T if by_column else matrix
    numbers = weight.dequantised()
    if matrix.shape != numbers.shape:
        raise ChaiError(
            f"{name} is {list(numbers.shape)} in the bundle and {list(matrix.shape)} in the reference model; "
            f"{other}"
        )
    distance = _farthest(matrix, numbers, weight)
    values = torch.from_numpy(np.ascontiguousarray(numbers.T if by_column else numbers))
    setattr(module, attribute, torch.nn.Parameter(values, requires_grad=False))
    return distance


def _farthest(matrix: NDArray[np.float32], numbers: NDArray[np.float32], weight: BlockWeight) -> float:
    half = weight.scales.dtype == np.float16
    allowed = _FARTHEST_IN_HALF[weight.bits] if half else FARTHEST_CODE
    steps = np.repeat(weight.scales.astype(np.float32), weight.block, axis=1)[:, : weight.width]
    codes, last = weight.codes(), 2**weight.bits - 1
    error = np.where(steps < 0, -1, 1) * (matrix - numbers)
    beyond = ((codes == 0) & (error < 0)) | ((codes == last) & (error > 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        away = np.where(error == 0, 0.0, np.abs(error) / np.abs(steps))
    return float(np.where(beyond, 0.0, away).max()) / allowed
