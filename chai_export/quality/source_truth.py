"""What a bundle of an ONNX file is compared with: that file, and how far it differs from itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.manifest import Manifest
from chai_export.errors import ChaiError
from chai_export.graph.match.find import Survey, require_sites
from chai_export.graph.prove.evaluate import forget_shapes
from chai_export.graph.prove.exact_activations import exact_activations, quantises_activations
from chai_export.graph.prove.exact_storage import exact_storage
from chai_export.graph.prove.float32 import to_float32
from chai_export.graph.prove.in_memory import in_memory
from chai_export.graph.prove.rounding_errors import FLOAT_ERROR, TIE_ERROR, add_rounding_errors
from chai_export.graph.prove.survey import survey
from chai_export.graph.read.load import find_onnx, load_graph, read_model
from chai_export.graph.read.quantised_caches import has_quantised_caches
from chai_export.models.logits import differences
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.quality.rounding import ALLOWANCE, STORED_ALLOWANCE, tolerances
from chai_export.quality.source_run import SourceRun
from chai_export.quality.truth import Expected
from chai_export.runtime.onnxruntime_model import GraphInMemory

_SEED = 20240312


def needs_twin(bundle: Bundle) -> bool:
    """Whether the bundle rounds more than float32 does: activations, rows of its caches, or everything."""
    manifest = bundle.manifest
    if manifest.dtype is not Dtype.FLOAT32 or manifest.storage.rounds:
        return True
    return quantises_activations(read_model(bundle.model_path).graph)


def exact_twin(bundle: Bundle) -> tuple[Bundle, GraphInMemory]:
    """The same weights computed in float32, with exact activations and rows that are kept as computed."""
    manifest = bundle.manifest
    model = read_model(bundle.model_path)
    exact_storage(model, manifest)
    exact_activations(model)
    to_float32(model)
    exact = [0] * manifest.num_layers
    changes = {"dtype": Dtype.FLOAT32, "engines": {}, "key_bits": exact, "value_bits": exact}
    return Bundle(bundle.path, manifest.model_copy(update=changes)), in_memory(model)


def with_exact_rows(bundle: Bundle) -> tuple[Bundle, GraphInMemory]:
    """The same graph with exact activations and rows that are cached as computed, in the bundle's dtype."""
    model = read_model(bundle.model_path)
    exact_storage(model, bundle.manifest)
    exact_activations(model)
    exact = [0] * bundle.manifest.num_layers
    changes = {"engines": {}, "key_bits": exact, "value_bits": exact}
    return Bundle(bundle.path, bundle.manifest.model_copy(update=changes)), in_memory(model)


class Source:
    """The ONNX file that a bundle was made from.

    Args:
        path: the file, or a directory with it.
        manifest: of the bundle.

    Raises:
        ChaiError: it is damaged, holds no decoder, or its sizes are not those of the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = find_onnx(path)
        self._dtype = ir.DataType(ELEMENT_TYPES[manifest.dtype].onnx)
        graph = load_graph(self._path)
        self.found: Survey = survey(graph)
        sites = require_sites(self.found)
        roles = self.found.roles
        assert roles is not None
        self.rows = roles.batch
        self.capacity = roles.capacity
        self.chunks = all(site.chunks for site in sites)
        self.quantised_caches = has_quantised_caches(read_model(self._path).graph)
        _require_same_sizes(self._path, manifest, len(sites), sites[0].heads)

    def as_written(self, *, exact: bool, batches: bool = True) -> SourceTruth:
        """The file as it is.

        Args:
            exact: it rounds nothing beyond float32.
            batches: it is right for more than one row.

        Raises:
            ChaiError: ONNX Runtime cannot run it here.
        """
        graph, written = load_graph(self._path), read_model(self._path)
        add_rounding_errors(graph, self._dtype, FLOAT_ERROR if exact else TIE_ERROR)
        moved = SourceRun(in_memory(graph), self.found)
        try:
            plain = self._opened(written)
        except ChaiError:  # operators of a GPU, caches as long as a window: taken apart they run
            plain = self._opened(load_graph(self._path))
        return SourceTruth(plain, moved, exact=exact, batches=batches and self.rows is None)

    def _opened(self, model: ir.Model) -> SourceRun:
        forget_shapes(model.graph)  # some exporters state wrong ones, which ONNX Runtime may believe
        opened = SourceRun(in_memory(model), self.found)
        opened.run(np.zeros((1, 1), np.int64), [1])
        return opened

    def exact(self) -> SourceTruth:
        """The file in float32 with exact activations."""
        models = [load_graph(self._path) for _ in range(2)]
        for model in models:
            exact_activations(model)
            to_float32(model)
        add_rounding_errors(models[1], ir.DataType.FLOAT)
        plain, moved = (SourceRun(in_memory(model), self.found) for model in models)
        return SourceTruth(plain, moved, exact=True, batches=self.rows is None)


class SourceTruth:
    """Right logits of a source under given chunks, and the largest right difference at each position.

    ``exact`` graphs have the spread of float32's rounding errors, times what :mod:`rounding` allows. A graph
    that rounds activations or everything to fewer bits sends single numbers the other way by a float32
    error, and that moves logits far more than the error itself. So it runs in another batch and in other
    chunks as well, and the largest of what moves counts.
    """

    def __init__(self, plain: SourceRun, moved: SourceRun, *, exact: bool, batches: bool) -> None:
        self._plain = plain
        self._moved = moved
        self._exact = exact
        self._batches = batches

    def agrees_in_batches(self, tokens: Sequence[int]) -> bool:
        """Whether a row has the same logits in company; not every exported graph is right there."""
        if not self._batches:
            return False
        expected, known = self.expected(tokens, [len(tokens)])
        found = differences(self._in_company(tokens, [len(tokens)]), expected.logits)
        return bool((found <= expected.tolerances)[known].all())

    def expected(self, tokens: Sequence[int], chunks: Sequence[int]) -> tuple[Expected, NDArray[np.bool_]]:
        """Logits of one fresh sequence fed in ``chunks``, and which positions have them."""
        row = np.asarray([tokens])
        plain = self._plain.run(row, chunks)
        draws: list[Callable[[], NDArray[np.float32]]] = [lambda: self._moved.run(row, chunks).logits[0]]
        if not self._exact:
            # Not in a batch and in chunks at once, which GroupQueryAttention does not take.
            whole = [len(tokens)] if plain.known.all() else chunks
            if self._batches:
                draws.append(lambda: self._in_company(tokens, whole))
            if whole != chunks:
                draws.append(lambda: self._plain.run(row, whole).logits[0])
        known = plain.known
        logits = plain.logits[0]
        allowed = _spread(logits[known], (draw()[known] for draw in draws))
        if not self._exact:
            allowed *= STORED_ALLOWANCE / ALLOWANCE
        every = np.zeros(len(logits))
        every[known] = allowed
        return Expected(logits, every), known

    def _in_company(self, tokens: Sequence[int], chunks: Sequence[int]) -> NDArray[np.float32]:
        other = np.random.default_rng(_SEED).permutation(np.asarray(tokens))
        logits: NDArray[np.float32] = self._plain.run(np.stack([np.asarray(tokens), other]), chunks).logits[0]
        return logits


def _spread(plain: NDArray[np.float32], draws: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
    bounds = [tolerances(plain, draw) for draw in draws]
    result: NDArray[np.float64] = np.max(bounds, axis=0)
    return result


def _require_same_sizes(path: Path, manifest: Manifest, layers: int, heads: object) -> None:
    names = ("num_query_heads", "num_kv_heads", "head_dim", "value_head_dim")
    pairs = [("num_layers", manifest.num_layers, layers)]
    pairs += [(name, getattr(manifest, name), getattr(heads, name)) for name in names]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ChaiError(
                f"the bundle has {name} {ours} and {path} {theirs}; "
                "give the file that the bundle was made from with --reference"
            )
