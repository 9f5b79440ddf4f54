"""A tiny bundle made by hand: token and position tables, two layers of the ops, a head.

Its truth is computed with NumPy and the op's reference, so tests of the runner need no exporter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.bundle import MODEL_FILE, Bundle, finalise
from chai_export.bundle.environment import save_environment
from chai_export.bundle.graph_io import GraphValue, graph_io, page_table, scales
from chai_export.bundle.manifest import GenerationSettings, Manifest, RopeRecord, Source
from chai_export.bundle.parts import BUNDLE
from chai_export.op.attributes import Attributes
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.op.function import Form, function_proto
from chai_export.op.head_map import kept_kv_heads
from chai_export.op.heads import DecoderHeads
from chai_export.op.reference import AttentionResult, clustered_head_attention
from chai_export.op.schema import DOMAIN
from chai_export.op.shared_reference import SharedAttentionResult, shared_clustered_head_attention
from chai_export.op.signature import VERSION

OPSET = 20
_DOT = "_DOT_"  # ONNX's text form has no dots in names


@dataclass(frozen=True)
class TinyModel:
    """Sizes and seeded weights.

    ``bits`` (of keys, of values; a pair, or one for each layer) are what caches are stored in. Texts longer
    than ``switch`` have other positions from their first token on.
    """

    kept: tuple[int, ...] = (2, 3)
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 4
    width: int = 16
    vocab: int = 40
    positions: int = 96
    probe: int = 5
    dtype: str = "float32"
    sources: tuple[int, ...] | None = None  # layers whose caches the layers read
    bits: tuple[int, int] | tuple[tuple[int, int], ...] = (0, 0)
    scale_group: int = 4
    switch: int = 0
    windows: tuple[int, ...] | None = None  # of each layer; 0: none
    weights: dict[str, np.ndarray] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        shapes = {
            "embedding": (self.vocab, self.width),
            "position_table": (self.positions, self.width),
            "head": (self.width, self.vocab),
        }
        for i in range(len(self.kept)):
            shapes[f"q{i}"] = (self.width, self.heads * self.head_dim)
            shapes[f"k{i}"] = (self.width, self.kv_heads * self.head_dim)
            shapes[f"v{i}"] = (self.width, self.kv_heads * self.value_dim)
            shapes[f"o{i}"] = (self.heads * self.value_dim, self.width)
        if self.switch:
            shapes["long_table"] = (self.positions, self.width)
        made = {n: (random.standard_normal(s) * 0.3).astype(self.dtype) for n, s in shapes.items()}
        object.__setattr__(self, "weights", made)

    def reference(self, ids: list[int], mode: str = "chai") -> tuple[np.ndarray, np.ndarray]:
        """float32 logits [T,V] and head maps [L,1,H] of one fresh sequence."""
        w = {name: array.astype(np.float32) for name, array in self.weights.items()}
        table = w["long_table" if 0 < self.switch < len(ids) else "position_table"]
        hidden = (w["embedding"][ids] + table[: len(ids)])[None]
        maps, made = [], {}
        for i, kept in enumerate(self.kept):
            r = kept if mode == "chai" else self.kv_heads
            result = self._attend(i, hidden, w, r, maps, made)
            maps.append(result.present_head_map)
            hidden = hidden + result.output @ w[f"o{i}"]
        return (hidden @ w["head"])[0], np.stack(maps)

    def greedy(self, ids: list[int], count: int, mode: str = "chai") -> list[int]:
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.reference([*ids, *made], mode)[0][-1].argmax()))
        return made

    def _attend(
        self,
        i: int,
        hidden: np.ndarray,
        w: dict[str, np.ndarray],
        kept: int,
        maps: list[Any],
        made: dict[int, Any],
    ) -> AttentionResult | SharedAttentionResult:
        """What layer ``i`` gives on the maps and ``made`` (keys, values, caches) before it; adds its own."""
        length = hidden.shape[1]
        q = self._split(hidden @ w[f"q{i}"], "q")
        rest = np.zeros((1, self.heads), np.int32), np.zeros(1, np.int32), np.array([length], np.int32)
        table = np.zeros((1, 1), np.int32)
        attributes = self._attributes(i)
        if not self._has_cache(i):
            k, v, cached = made[self.sources[i]]
            caches = cached.key_cache, cached.value_cache, cached.key_scales, cached.value_scales
            return shared_clustered_head_attention(
                q, k, v, *caches, table, maps[self.sources[i]], *rest, attributes=attributes
            )
        k, v = (self._split(hidden @ w[f"{n}{i}"], n) for n in "kv")
        storage, pools, factors = self._storage(), [], []
        for held, heads in ((storage.key(i), kept), (storage.value(i), self.kv_heads)):
            pools.append(np.zeros((1, heads, length, held.columns), held.dtype(np.dtype(np.float32))))
            of_scales = np.zeros((1, heads, length, held.scale_columns), np.float16)
            factors.append(of_scales if held.quantised else None)
        result = clustered_head_attention(q, k, v, *pools, *factors, table, *rest, attributes=attributes)
        assert len(kept_kv_heads(result.present_head_map[0], self.heads // self.kv_heads)) <= kept
        made[i] = k, v, result
        return result

    def _bits(self, i: int) -> tuple[int, int]:
        """Of the cache that layer ``i`` reads."""
        owner = i if self.sources is None else self.sources[i]
        bits: Any = self.bits
        return bits[owner] if isinstance(bits[0], tuple) else bits

    def _attributes(self, i: int) -> Attributes:
        key, value = self._bits(i)
        bits = {"key_bits": key, "value_bits": value, "group": self.scale_group}
        return Attributes(probe_tokens=self.probe, window=self._window(i), **bits)

    def _window(self, i: int) -> int:
        return self.windows[i] if self.windows is not None else 0

    def _page_table(self, i: int) -> str:
        return page_table(self._window(i)).replace(".", _DOT)

    def _storage(self) -> CacheStorage:
        keys, values = zip(*map(self._bits, range(len(self.kept))), strict=True)
        return CacheStorage(
            self._head_counts(), Dtype(self.dtype), list(keys), list(values), self.scale_group
        )

    def _has_cache(self, i: int) -> bool:
        return self.sources is None or self.sources[i] == i

    def _split(self, rows: np.ndarray, kind: str) -> np.ndarray:
        heads = self.heads if kind == "q" else self.kv_heads
        return rows.reshape(1, rows.shape[1], heads, -1).transpose(0, 2, 1, 3)

    def graph(self) -> onnx.ModelProto:
        layers = range(len(self.kept))
        io = graph_io(self._storage(), self.vocab, windows=self.windows, rope_lengths=bool(self.switch))
        inputs, outputs = ([_declared(value) for value in values] for values in (io.inputs, io.outputs))
        nodes = [_EMBED.replace("PLACES", _SWITCHED if self.switch else _PLAIN)]
        nodes += [self._layer(i) for i in layers]
        map_names = ", ".join(f"new_map_{i}" for i in layers)
        nodes.append(f"present_head_map = Concat <axis = 0> ({map_names})")
        nodes.append(_HEAD.replace("HIDDEN", f"hidden_{len(self.kept)}"))
        body = "\n".join(nodes)
        text = (
            f'<ir_version: 10, opset_import: ["" : {OPSET}, "chai" : {VERSION}]>\n'
            f"tiny ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{\n{body}\n}}"
        )
        model = onnx.parser.parse_model(text)
        for value in (*model.graph.input, *model.graph.output):
            value.name = value.name.replace(_DOT, ".")
        for node in model.graph.node:
            node.input[:] = [name.replace(_DOT, ".") for name in node.input]
            node.output[:] = [name.replace(_DOT, ".") for name in node.output]
        for i, node in enumerate(node for node in model.graph.node if node.domain == DOMAIN):
            function = function_proto(OPSET, Form.of(self._attributes(i)), node.op_type)
            node.overload = function.overload
            if function not in model.functions:
                model.functions.append(function)
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.weights.items())
        constants = {"zero": [0], "one": [1], "axis2": [2], "switch": [self.switch], **self._shapes()}
        for name, values in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return model

    def _shapes(self) -> dict[str, list[int]]:
        kinds = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        shapes = {f"shape_{kind}": [0, 0, heads, -1] for kind, heads in kinds.items()}
        return {**shapes, **{f"layer_{i}": [i] for i in range(len(self.kept))}}

    def _layer(self, i: int) -> str:
        lines = []
        for kind in "qkv" if self._has_cache(i) else "q":
            lines.append(f"{kind}_flat_{i} = MatMul (hidden_{i}, {kind}{i})")
            lines.append(f"{kind}_split_{i} = Reshape ({kind}_flat_{i}, shape_{kind})")
            lines.append(f"{kind}_{i} = Transpose <perm = [0, 2, 1, 3]> ({kind}_split_{i})")
        lines.append(f"map_3_{i} = Gather <axis = 0> (head_map, layer_{i})")
        lines.append(f"map_{i} = Squeeze (map_3_{i}, zero)")
        return "\n".join([*lines, self._node(i), *self._after(i)])

    def _after(self, i: int) -> list[str]:
        return [
            f"new_map_{i} = Unsqueeze (chosen_{i}, zero)",
            f"back_{i} = MatMul (out_{i}, o{i})",
            f"hidden_{i + 1} = Add (hidden_{i}, back_{i})",
        ]

    def _node(self, i: int) -> str:
        written = self._attributes(i).as_onnx().items()
        attributes = ", ".join(f"{name} = {value}" for name, value in written)
        source = i if self._has_cache(i) else self.sources[i]
        maps = f"map_{i}, past_lengths, lengths"
        names = self._caches(source, "past" if self._has_cache(i) else "present")
        new = f"q_{i}, k_{source}, v_{source}"
        if self._has_cache(i):
            outputs = ", ".join([f"out_{i}", *self._caches(source, "present"), f"chosen_{i}"])
            inputs = f"{new}, {', '.join(names)}, {self._page_table(i)}, {maps}"
            return f"{outputs} = chai.ClusteredHeadAttention <{attributes}> ({inputs})"
        inputs = f"{new}, {', '.join(names)}, {self._page_table(i)}, chosen_{source}, {maps}"
        return f"out_{i}, chosen_{i} = chai.SharedClusteredHeadAttention <{attributes}> ({inputs})"

    def _caches(self, i: int, prefix: str) -> list[str]:
        """The four caches of a layer in the order of the op; those that it has not are empty."""
        storage = self._storage()
        names = [f"{prefix}_key.{i}", f"{prefix}_value.{i}"]
        of_scales = [
            scales(name) if held.quantised else ""
            for name, held in zip(names, (storage.key(i), storage.value(i)), strict=True)
        ]
        return [name.replace(".", _DOT) or '""' for name in names + of_scales]

    def _head_counts(self) -> DecoderHeads:
        sizes = (self.heads, self.kv_heads, self.head_dim, self.value_dim)
        return DecoderHeads(*sizes, num_layers=len(self.kept), kv_source_layers=self.sources)

    def manifest(self, **changes: Any) -> Manifest:
        storage = self._storage()
        values: dict[str, Any] = {
            "op_version": VERSION,
            "dtype": self.dtype,
            **asdict(self._head_counts()),
            "vocab_size": self.vocab,
            "max_positions": self.positions,
            "kept_heads": list(self.kept),
            "key_bits": storage.key_bits,
            "value_bits": storage.value_bits,
            "group": storage.group,
            "windows": None if self.windows is None else list(self.windows),
            "probe_tokens": self.probe,
            "opset": OPSET,
            "source": Source(kind="onnx", name="tiny"),
            "created_with": "tests",
            "rope": RopeRecord(switch_lengths=[self.switch]) if self.switch else None,
        }
        return Manifest(**{**values, **changes})

    def write(self, path: Path, *, tokenizer: Any = None, **changes: Any) -> Bundle:
        """Write the bundle; ``changes`` are fields of the manifest, or eos for its generation settings."""
        eos = changes.pop("eos", [])
        with atomic_directory(path, BUNDLE) as directory:
            onnx.save(self.graph(), directory / MODEL_FILE)
            settings = GenerationSettings(eos_token_ids=eos)
            if tokenizer is not None:
                found = save_environment(directory, tokenizer=tokenizer)
                settings = found.model_copy(update={"eos_token_ids": eos})
            finalise(directory, self.manifest(**{"generation": settings, **changes}))
        return Bundle.load(path)


def _declared(value: GraphValue) -> str:
    """An input or output in ONNX's text form."""
    kind = ELEMENT_TYPES[value.dtype].onnxruntime.removeprefix("tensor(").removesuffix(")")
    return f"{kind}[{', '.join(map(str, value.dims))}] {value.name.replace('.', _DOT)}"


_EMBED = """
  n_col = Unsqueeze (past_lengths, one)
  m_col = Unsqueeze (lengths, one)
  size = Shape (input_ids)
  tokens_1 = Gather (size, one)
  tokens_0 = Squeeze (tokens_1)
  start = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  token = Range (start, tokens_0, step)
  n_64 = Cast <to = 7> (n_col)
  m_64 = Cast <to = 7> (m_col)
  last = Sub (m_64, one)
  inside = Min (token, last)
  place_any = Add (n_64, inside)
  place = Max (place_any, zero)
  by_token = Gather (embedding, input_ids)
  PLACES
  hidden_0 = Add (by_token, by_place)
"""
_PLAIN = "by_place = Gather (position_table, place)"
_SWITCHED = """
  short_place = Gather (position_table, place)
  long_place = Gather (long_table, place)
  rope_64 = Cast <to = 7> (rope_lengths)
  is_long_1 = Greater (rope_64, switch)
  is_long_2 = Unsqueeze (is_long_1, one)
  is_long = Unsqueeze (is_long_2, axis2)
  by_place = Where (is_long, long_place, short_place)
"""
_HEAD = """
  wanted = Unsqueeze (output_positions, axis2)
  chosen = GatherND <batch_dims = 1> (HIDDEN, wanted)
  logits = MatMul (chosen, head)
"""


def letters_tokenizer(*, add_bos: bool = False, chat_template: str | None = None) -> Any:
    """A byte-level tokenizer without merges over a few bytes: ids 0 … 3 are special, then one id a byte.

    Two of its tokens are the bytes of "é", so that text can end in the middle of a character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<end>", "<unk>"]
    alphabet = [*"abcdefghijklmnopqrstuvwxyz .,!", *_byte_level("é"), "Ċ", "ł"]
    alphabet = ["Ġ" if letter == " " else letter for letter in alphabet]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<end>"]})
    fast.chat_template = chat_template
    return fast


def _byte_level(text: str) -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0])
