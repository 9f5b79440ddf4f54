"""How the rotary embedding of a model depends on the length of a row, read from its configuration.

Most rope types have constant factors: a key is rotated by its position alone. Two types have not.

longrope   two sets of factors: one for rows of up to the original context, one for longer rows. transformers
           computes the cache anew when a row crosses (Phi-3's ``prepare_inputs_for_generation``), since keys
           that the short factors rotated mean nothing to queries that the long ones did.
dynamic    factors that change with every token past the trained context, while keys in the cache stay as they
           were rotated: what transformers computes there depends on how a text was cut into calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chai_export.bundle.manifest import RopeRecord

_SWITCHING = "longrope"
_GROWING = "dynamic"
_SCALED = frozenset({"llama3", "longrope", "yarn"})
"""Types that name the context they stretch: original_max_position_embeddings."""
_MOST = 1 << 31


@dataclass(frozen=True)
class Rope:
    """Rope types of a model and the lengths, in tokens, that matter to them.

    Attributes:
        types: as transformers names them, each once; none for models without rotary embedding.
        switch_lengths: a row longer than one of these has other factors, from its first token on.
        last_length: rows cannot be longer: past it factors change with every token.
        original_lengths: contexts that the types above stretch, those of constant factors included.
    """

    types: tuple[str, ...] = ()
    switch_lengths: tuple[int, ...] = ()
    last_length: int | None = None
    original_lengths: tuple[int, ...] = ()

    def record(self) -> RopeRecord:
        """What a manifest says of it."""
        return RopeRecord(
            types=list(self.types), switch_lengths=list(self.switch_lengths), last_length=self.last_length
        )


def rope_of(config: Any) -> Rope:
    """The rope of a transformers configuration, or of the dictionary in a config.json of any age."""
    if config is None:
        return Rope()
    context = _length(_get(config, "max_position_embeddings"))
    types: dict[str, None] = {}
    switches, originals, growing = set(), set(), False
    for parameters, beside in _parameters(config):
        kind = _type(parameters, _get(config, "model_type"))
        types[kind] = None
        growing = growing or _GROWING in kind
        original = beside or _length(parameters.get("original_max_position_embeddings")) or context
        if kind in _SCALED and original is not None:
            originals.add(original)
            if kind == _SWITCHING:
                switches.add(original)
    return Rope(
        types=tuple(types),
        switch_lengths=tuple(sorted(switches)),
        last_length=context if growing else None,
        original_lengths=tuple(sorted(originals)),
    )


def _parameters(config: Any) -> list[tuple[Mapping[str, Any], int | None]]:
    """The rope parameters, one set or one per kind of layer, each with the original context given beside it.

    transformers prefers what is given beside one set (Phi-3) and does not look there for several.
    """
    given = _get(config, "rope_parameters") or _get(config, "rope_scaling")
    if not isinstance(given, Mapping):
        return [] if _get(config, "rope_theta") is None else [({}, None)]
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    if nested:
        return [(parameters, None) for parameters in nested]
    return [(given, _length(_get(config, "original_max_position_embeddings")))]


def _type(parameters: Mapping[str, Any], family: Any) -> str:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    # Early Phi-3 files call the same thing su or yarn.
    return _SWITCHING if kind == "su" or (kind == "yarn" and family == "phi3") else kind


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _length(value: Any) -> int | None:
    """A number of tokens; files hold 4096.0 too, and anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and 0 < value < _MOST else None
