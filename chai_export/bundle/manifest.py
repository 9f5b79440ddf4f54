"""manifest.json: what a bundle says about itself, as typed and validated values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from chai_export.arguments import MOST, shown
from chai_export.bundle.choices import Backend, Heads, SourceKind
from chai_export.bundle.file_names import FileName
from chai_export.bundle.graph_io import GraphIO, graph_io
from chai_export.bundle.sampling_rules import wanted_instead
from chai_export.bundle.work_directory import recover
from chai_export.errors import ChaiError
from chai_export.files import MissingFileError, read_json
from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.cache_storage import CacheBytes, CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads
from chai_export.op.kv_sharing import check_same_kept, check_sources
from chai_export.op.signature import VERSION
from chai_export.op.storage import BITS

FORMAT: Final = "chai-bundle/1"
FILE_NAME = "manifest.json"

Count = Annotated[int, Field(ge=1, le=MOST)]
Large = Annotated[int, Field(ge=1)]
Window = Annotated[int, Field(ge=0, le=MOST)]
TokenId = Annotated[int, Field(ge=0)]


def _stored(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"it is {bits} and should be one of {', '.join(map(str, BITS))}")
    return bits


# No Literal: that takes 8.0 and false for numbers of bits.
Bits = Annotated[
    int, AfterValidator(_stored), WithJsonSchema({"enum": list(BITS), "type": "integer"}, mode="validation")
]
"""How keys or values are stored: in the model's dtype, float16, 8 or 4 bits."""

QuantisedWeights = Literal["int4", "int8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileRecord(_Strict):
    """One file of the bundle: its SHA-256 (lower-case hexadecimal) and its size in bytes."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: Annotated[int, Field(ge=0)]


class Source(_Strict):
    """Where the model came from: a Hugging Face model ("hf") or another exporter's graph ("onnx")."""

    kind: SourceKind
    name: str
    model_type: str | None = None


class Proof(_Strict):
    """The numerical comparison that was made before the bundle was written."""

    compared: str
    max_abs_diff: float
    tolerance: float


class GenerationSettings(_Strict):
    """What `run` needs to behave as transformers does with the same model.

    ``add_bos`` is what the tokenizer does with plain text. Sampling defaults hold when sampling is asked for.
    """

    eos_token_ids: list[TokenId] = []
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    add_bos: bool = False
    has_chat_template: bool = False
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    @field_validator("top_k", "top_p", "repetition_penalty", mode="before")
    @classmethod
    def _usable(cls, value: object, info: ValidationInfo) -> object:
        wanted = None if value is None else wanted_instead(str(info.field_name), value)
        if wanted is not None:
            raise ValueError(f"it is {shown(value)} and should be {wanted}")
        return value


class EngineRecord(_Strict):
    """An engine inside the bundle: what it was built with, for which limits, and its files.

    ``model_sha256`` is the hash of the model.onnx it was built from, ``cache_memory`` the bytes that caches
    may take unless a run says otherwise. Fields that a backend does not have are None: ONNX Runtime has
    neither a GPU architecture nor (with the function body) a plugin.
    """

    backend: Backend
    runtime_version: str
    model_sha256: str
    max_batch: Count
    max_seq: Count
    cache_memory: Large | None = Field(default=None, exclude_if=lambda size: size is None)
    op_version: Count
    gpu_architecture: str | None = None
    plugin_version: str | None = None
    files: dict[FileName, FileRecord] = {}
    settings: dict[str, str | int | float | bool] = {}
    created_with: str


class StaticMembership(_Strict):
    """Head maps fixed at export, int [L][H], and what the cut projections save."""

    head_maps: list[list[Annotated[int, Field(ge=0)]]]
    parameters_saved: Annotated[int, Field(ge=0)]
    parameters_before: Large
    flops_saved_per_token: Annotated[int, Field(ge=0)]


class RopeRecord(_Strict):
    """What rotary embedding makes of long rows; ``types`` as transformers names them, where that is known.

    A row longer than one of ``switch_lengths`` is rotated with other factors from its first token on, so its
    caches are computed anew when it crosses; the graph has an input rope_lengths then. ``last_length`` is
    where positions end, because the graph has no factors for longer rows.
    """

    types: list[str] = []
    switch_lengths: list[Count] = []
    last_length: Count | None = None

    @field_validator("switch_lengths")
    @classmethod
    def _ascending(cls, lengths: list[int]) -> list[int]:
        if lengths != sorted(set(lengths)):
            raise ValueError(f"{lengths} does not ascend")
        return lengths


class Manifest(_Strict):
    """Everything a runner must know about a bundle. Lengths are in tokens, sizes in bytes.

    ``max_positions`` is a hard limit (length of a learned position table), ``context_length`` the length
    the model was trained for. ``kv_source_layers``, absent unless layers share caches, names for each layer
    the one whose K and V cache it reads: itself, or an earlier one (:mod:`chai_export.op.kv_sharing`).
    ``key_bits``, ``value_bits`` (one number per layer, 0 for the model's dtype) and ``group`` (elements that
    share a scale) are what the caches are stored in.
    ``windows``, absent unless a layer has one, are the positions that a token of each layer sees, its own
    included; 0 is all of them.
    ``rope`` is absent where every rotary factor is a constant that the graph holds.
    ``weights``, absent unless most weights are integers, is their type; ``dtype`` is that of the caches.
    ``files`` maps paths relative to the bundle to their hash and size.
    """

    format: Literal["chai-bundle/1"] = FORMAT
    op_version: Count
    dtype: Dtype
    num_layers: Count
    num_query_heads: Count
    num_kv_heads: Count
    head_dim: Count
    value_head_dim: Count
    vocab_size: Count
    max_positions: Count | None = None
    context_length: Count | None = None
    kept_heads: list[Count]
    kv_source_layers: list[int] | None = Field(default=None, exclude_if=lambda layers: layers is None)
    key_bits: list[Bits]
    value_bits: list[Bits]
    group: Count = DEFAULT_GROUP
    windows: list[Window] | None = Field(default=None, exclude_if=lambda windows: windows is None)
    rope: RopeRecord | None = Field(default=None, exclude_if=lambda rope: rope is None)
    probe_tokens: Count
    opset: Count
    weights: QuantisedWeights | None = Field(default=None, exclude_if=lambda weights: weights is None)
    source: Source
    proof: Proof | None = None
    static: StaticMembership | None = None
    generation: GenerationSettings = GenerationSettings()
    files: dict[FileName, FileRecord] = {}
    engines: dict[Backend, EngineRecord] = {}
    created_with: str

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        _ = self.head_counts  # raises where the counts do not fit each other
        if len(self.kept_heads) != self.num_layers:
            raise ValueError(f"kept_heads has {len(self.kept_heads)} numbers for {self.num_layers} layers")
        if max(self.kept_heads) > self.num_kv_heads:
            raise ValueError(
                f"kept_heads has {max(self.kept_heads)}, more than the {self.num_kv_heads} KV heads there are"
            )
        if self.kv_source_layers is not None:
            check_sources(self.kv_source_layers, self.num_layers)
            check_same_kept(self.kept_heads, self.kv_source_layers)
        _ = self.storage  # raises where the bits do not fit the heads
        if self.windows is not None:
            self._check_windows(self.windows)
        if self.static is not None:
            self._check_head_maps(self.static.head_maps)
        for backend, record in self.engines.items():
            if record.backend != backend:
                raise ValueError(f"the engine of {backend} says that it is one of {record.backend}")
        return self

    @property
    def storage(self) -> CacheStorage:
        """What the caches hold."""
        return CacheStorage(self.head_counts, self.dtype, self.key_bits, self.value_bits, self.group)

    @property
    def weight_type(self) -> str:
        """What the weights are stored as: "int4", "int8", or the dtype."""
        return self.weights or self.dtype

    def _check_windows(self, windows: list[int]) -> None:
        if len(windows) != self.num_layers:
            raise ValueError(f"windows has {len(windows)} numbers for {self.num_layers} layers")
        for layer, source in enumerate(self.kv_source_layers or ()):
            if windows[layer] != windows[source]:
                raise ValueError(
                    f"windows has {windows[layer]} for layer {layer} and {windows[source]} for layer "
                    f"{source}, whose cache it reads"
                )

    def window(self, layer: int) -> int:
        """Positions that a token of a layer sees, its own included; 0: all."""
        return self.windows[layer] if self.windows is not None else 0

    @property
    def cache_windows(self) -> list[int]:
        """The windows that caches have, ascending; 0, where there is a cache without one, comes first."""
        return sorted({self.window(layer) for layer in self.cache_layers})

    def _check_head_maps(self, maps: list[list[int]]) -> None:
        heads = self.num_query_heads
        if len(maps) != self.num_layers or any(len(each) != heads or max(each) >= heads for each in maps):
            raise ValueError(
                f"static.head_maps are not {self.num_layers} maps of {heads} query heads to query heads"
            )

    @property
    def head_counts(self) -> DecoderHeads:
        """Numbers and widths of the heads, and the layers that have a cache."""
        return DecoderHeads(
            self.num_query_heads,
            self.num_kv_heads,
            self.head_dim,
            self.value_head_dim,
            num_layers=self.num_layers,
            kv_source_layers=self.kv_source_layers,
        )

    @property
    def cache_layers(self) -> list[int]:
        """The layers that have a cache: all but those that read an earlier layer's."""
        return self.head_counts.cache_layers

    @property
    def io(self) -> GraphIO:
        """Inputs and outputs of the bundle's graph."""
        return graph_io(
            self.storage, self.vocab_size, windows=self.windows, rope_lengths=bool(self.switch_lengths)
        )

    @property
    def switch_lengths(self) -> list[int]:
        """Lengths past which a row is rotated with other factors, ascending."""
        return self.rope.switch_lengths if self.rope is not None else []

    def heads(self, mode: Heads | str) -> list[int]:
        """KV heads in the K cache of each layer: ``"chai"`` the kept ones, ``"all"`` every one.

        Raises:
            UsageError: another mode.
        """
        return self.kept_heads if Heads(mode) is Heads.CHAI else self.head_counts.all_kept

    def kv_bytes_per_token(self, mode: Heads | str = Heads.CHAI) -> int:
        """Bytes of K and V cache that one token of one row takes, over all layers, shared caches once."""
        return self.kv_bytes_by_part(mode).total

    def kv_bytes_by_part(self, mode: Heads | str = Heads.CHAI) -> CacheBytes:
        """The same for keys, values and scales."""
        return self.storage.token_bytes(self.heads(mode))

    def kv_bytes_by_window(self, mode: Heads | str = Heads.CHAI) -> dict[int, int]:
        """Bytes of one token by window (0: none), ascending: a row keeps so many of its last tokens there."""
        storage, kept = self.storage, self.heads(mode)
        found = dict.fromkeys(self.cache_windows, 0)
        for layer in self.cache_layers:
            found[self.window(layer)] += storage.layer_bytes(layer, kept[layer]).total
        return found

    def kv_bytes_of(self, tokens: int, mode: Heads | str = Heads.CHAI) -> int:
        """Bytes of what a token after ``tokens`` others of its row sees of them; pages are rounded up."""
        return sum(
            size * (min(tokens, window) if window else tokens)
            for window, size in self.kv_bytes_by_window(mode).items()
        )

    @property
    def kv_bytes_per_token_float16(self) -> int:
        """What a token takes with all heads in float16, the common yardstick."""
        float16 = CacheStorage.exact(self.head_counts, Dtype.FLOAT16)
        return float16.token_bytes(self.head_counts.all_kept).total


def read_manifest(directory: Path) -> Manifest:
    """Read and validate ``directory/manifest.json``.

    Raises:
        ChaiError: it is missing, is not JSON, has another format or op version, or a field is wrong.
    """
    path = directory / FILE_NAME
    again = "run `chai-export export` (or `rewrite`) again"
    try:
        content = read_json(path, fix=again)
    except MissingFileError:
        if recover(directory) and path.exists():  # it was being replaced
            return read_manifest(directory)
        raise ChaiError(
            f"{directory} is not a bundle (no {FILE_NAME}); name a directory written by `chai-export export` "
            "or `chai-export rewrite`"
        ) from None
    if content.get("format") != FORMAT:
        raise ChaiError(
            f"{path} has format {shown(content.get('format'))} and this version of chai_export reads "
            f"{FORMAT!r}; {again} with it"
        )
    version = content.get("op_version", VERSION)
    if isinstance(version, int) and version != VERSION:
        raise ChaiError(
            f"{directory} has version {version} of the op and this version of chai_export runs version "
            f"{VERSION}; {again} with it"
        )
    try:
        # As JSON and strictly: 4.0, true and "4" are no counts, in the C++ runner neither.
        return Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ChaiError(f"{path} is not valid: {first_problem(error)}; {again}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``directory/manifest.json`` of a bundle that nobody else sees yet.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / FILE_NAME).write_text(manifest_text(manifest), encoding="utf-8")


def manifest_text(manifest: Manifest) -> str:
    """The content of manifest.json."""
    return manifest.model_dump_json(indent=2) + "\n"


def first_problem(error: ValidationError) -> str:
    """The first finding of a validation as ``field: what is wrong``, in one line."""
    finding = error.errors()[0]
    where = ".".join(str(part) for part in finding["loc"])
    message = " ".join(finding["msg"].split()).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
