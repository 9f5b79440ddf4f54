"""What the K and V caches of a decoder hold, layer by layer, and the bytes that takes: said here alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.op.heads import DecoderHeads
from chai_export.op.storage import SCALES_PER_GROUP, Storage


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a part of a cache: codes or elements of keys and of values, and the scales of both."""

    keys: int = 0
    values: int = 0
    scales: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.keys + self.values + self.scales

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(self.keys + other.keys, self.values + other.values, self.scales + other.scales)


@dataclass(frozen=True)
class CacheStorage:
    """The storage of every layer's keys and values.

    Attributes:
        heads: of the decoder.
        dtype: of the model; what 0 bits are.
        key_bits: by layer 0, 16 (float16), 8 or 4. A layer that reads another one's cache has the same.
        value_bits: likewise.
        group: elements of a row that share a scale.

    Raises:
        ValueError: there is not one number per layer, the numbers of layers on one cache differ, or the group
            does not divide the head dims where they are quantised.
    """

    heads: DecoderHeads
    dtype: Dtype
    key_bits: Sequence[int]
    value_bits: Sequence[int]
    group: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if len(bits) != self.heads.num_layers:
                raise ValueError(f"{name} has {len(bits)} numbers for {self.heads.num_layers} layers")
            for layer, source in enumerate(self.heads.kv_source_layers or ()):
                if bits[layer] != bits[source]:
                    raise ValueError(
                        f"{name} of layer {layer} is {bits[layer]}, and {bits[source]} of layer {source}, "
                        "whose cache it reads"
                    )
        for layer in range(self.heads.num_layers):
            _ = self.key(layer), self.value(layer)  # they check the group

    @staticmethod
    def exact(heads: DecoderHeads, dtype: Dtype) -> CacheStorage:
        """Everything in the model's dtype."""
        exact = (0,) * heads.num_layers
        return CacheStorage(heads, dtype, exact, exact)

    @property
    def rounds(self) -> bool:
        """Whether any row is stored in less than it is computed in."""
        return any((*self.key_bits, *self.value_bits))

    @property
    def quantises(self) -> bool:
        """Whether any row is stored as codes with scales."""
        return any(bits in SCALES_PER_GROUP for bits in (*self.key_bits, *self.value_bits))

    def key(self, layer: int) -> Storage:
        """The storage of a layer's keys."""
        return Storage(self.key_bits[layer], self.heads.head_dim, self.group)

    def value(self, layer: int) -> Storage:
        """The storage of a layer's values."""
        return Storage(self.value_bits[layer], self.heads.value_head_dim, self.group)

    def element(self, storage: Storage) -> str:
        """Name of the element type of a cache, of :data:`~chai_export.op.dtypes.ELEMENT_TYPES`."""
        return str(self.dtype) if storage.bits == 0 else str(storage.dtype(ELEMENT_TYPES[self.dtype].numpy))

    def layer_bytes(self, layer: int, kept: int) -> CacheBytes:
        """Bytes of one token of one row in a layer's cache with ``kept`` KV heads in K.

        A page takes as many times that as it has positions.
        """
        item = ELEMENT_TYPES[self.dtype].item_size
        key, value, kv_heads = self.key(layer), self.value(layer), self.heads.num_kv_heads
        return CacheBytes(
            kept * key.element_bytes(item),
            kv_heads * value.element_bytes(item),
            kept * key.scale_bytes + kv_heads * value.scale_bytes,
        )

    def token_bytes(self, kept_heads: Sequence[int]) -> CacheBytes:
        """The same over all layers, shared caches once; ``kept_heads[i]`` KV heads are in K of layer i."""
        layers = self.heads.cache_layers
        return sum((self.layer_bytes(layer, kept_heads[layer]) for layer in layers), CacheBytes())
