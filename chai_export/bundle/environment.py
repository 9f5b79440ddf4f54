"""The surroundings of a model that decide how it talks: tokenizer, chat template, end-of-sequence ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chai_export.arguments import as_integer, shown
from chai_export.bundle.manifest import GenerationSettings
from chai_export.bundle.sampling_rules import wanted_instead
from chai_export.bundle.text_tokenizer import record_text_tokenizer
from chai_export.progress import note

GENERATION_FILE = "generation_config.json"


def save_environment(
    directory: Path,
    *,
    tokenizer: Any | None = None,
    config: Any | None = None,
    generation_config: Any | None = None,
) -> GenerationSettings:
    """Write tokenizer files and generation_config.json into ``directory``; return what the manifest needs.

    ``tokenizer``, ``config`` and ``generation_config`` are those of transformers, or plain dictionaries for
    the last two. Ids come from the first of generation_config, config and tokenizer that has any, which is
    the order in which transformers decides.
    """
    sources = [_plain(generation_config), _plain(config)]
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
        record_text_tokenizer(directory, tokenizer)
        sources.append({name: getattr(tokenizer, name, None) for name in _ID_NAMES})
    defaults = _usable_defaults(_plain(generation_config))
    settings = GenerationSettings(
        eos_token_ids=_first_ids(sources, "eos_token_id"),
        bos_token_id=_first_id(sources, "bos_token_id"),
        pad_token_id=_first_id(sources, "pad_token_id"),
        add_bos=_adds_bos(tokenizer),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        top_k=defaults.get("top_k"),
        top_p=defaults.get("top_p"),
        repetition_penalty=defaults.get("repetition_penalty"),
    )
    written = {**defaults, "eos_token_id": settings.eos_token_ids}
    written |= {name: value for name in _ID_NAMES[1:] if (value := getattr(settings, name)) is not None}
    text = json.dumps(written, indent=2, sort_keys=True, default=str)
    (directory / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")
    return settings


def _usable_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """What the model's makers set, without values that no sampler can use; each of those is noted.

    A model is worth more than a slip in its generation_config.json, so it is exported without that value.
    """
    defaults = {}
    for name, value in generation_config.items():
        if value is None or name.startswith("_"):
            continue
        wanted = wanted_instead(name, value) if name in _SAMPLING_NAMES else None
        if wanted is None:
            defaults[name] = value
        else:
            note(f"{GENERATION_FILE} of the model has {name} {shown(value)}, which is left out: not {wanted}")
    return defaults


_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "repetition_penalty")
_ID_NAMES = ("eos_token_id", "bos_token_id", "pad_token_id")


def _plain(source: Any | None) -> dict[str, Any]:
    if source is None:
        return {}
    return dict(source) if isinstance(source, dict) else dict(source.to_dict())


def _first_ids(sources: list[dict[str, Any]], name: str) -> list[int]:
    for source in sources:
        value = source.get(name)
        ids = value if isinstance(value, list | tuple) else [value]
        # Negative ids stand for "none" in some configurations.
        valid = [i for i in map(as_integer, ids) if i is not None and i >= 0]
        if valid:
            return valid
    return []


def _first_id(sources: list[dict[str, Any]], name: str) -> int | None:
    ids = _first_ids(sources, name)
    return ids[0] if ids else None


def _adds_bos(tokenizer: Any | None) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or bos is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == bos
