"""Chat templates as transformers renders them, without transformers: strangers' programs in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message may bring its reasoning; templates read the first, some the second."""


def render(
    template: str,
    turns: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """A chat in the words of a template.

    Args:
        template: its text.
        turns: messages; keys whose value is None count as absent.
        special_tokens: what a template knows by name, such as ``bos_token``.
        tools: functions that the answer may call.
        add_generation_prompt: end with what begins an answer.

    Raises:
        ValueError: there are no turns.
        jinja2.TemplateError: the text is no template, asks for what the sandbox refuses, or raises; it can
            raise anything else, too.
    """
    if not turns:
        raise ValueError("a chat has no messages")
    messages = [_with_reasoning(_plain({k: v for k, v in turn.items() if v is not None})) for turn in turns]
    return _compiled(template).render(
        messages=messages,
        tools=None if tools is None else _plain(list(tools)),
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **special_tokens,
    )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, _REASONING[0]: found}


def _plain(value: Any) -> Any:
    """A copy in JSON's types: a template gets no object that has methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=_now, dict=_Dictionaries(), namespace=_PublicNamespace
    )
    return environment.from_string(template)


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks what an assistant says, for training; rendered it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_said")
        return nodes.CallBlock(call, [], [], inside).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return str(caller())


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes what HTML would read otherwise."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dictionaries:
    """``dict`` of templates: what makes dictionaries, and no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As that of dict."""
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """A namespace that holds no names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No parameter has a name: a template may call an attribute "self".
        own, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _require_public(name)
        Namespace.__init__(own, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r} of a namespace: names with an underscore")
