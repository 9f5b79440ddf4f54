"""Inputs and outputs of the model on the server: one table for its configuration and for reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chai_export.errors import UsageError

_NUMPY: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}


@dataclass(frozen=True)
class Value:
    """A tensor of rank 1; ``type`` is the server's, ``many`` is for any number of elements, else 1."""

    name: str
    type: str
    many: bool = False

    def array(self, content: Sequence[Any]) -> np.ndarray[Any, Any]:
        """The tensor with this content, texts as UTF-8."""
        if self.type == "TYPE_STRING":
            return np.array([text.encode("utf-8") for text in content], np.object_)
        return np.array(content, _NUMPY[self.type])


TEXT, IDS = Value("text_input", "TYPE_STRING"), Value("input_ids", "TYPE_INT64", many=True)
"""The prompt: one of both."""
STREAM = Value("stream", "TYPE_BOOL")
CHAT = Value("chat", "TYPE_BOOL")
MAX_TOKENS = Value("max_tokens", "TYPE_INT32")
TEMPERATURE = Value("temperature", "TYPE_FP32")
TOP_K, TOP_P = Value("top_k", "TYPE_INT32"), Value("top_p", "TYPE_FP32")
REPETITION_PENALTY = Value("repetition_penalty", "TYPE_FP32")
SEED = Value("seed", "TYPE_INT64")
STOP = Value("stop", "TYPE_STRING", many=True)
IGNORE_EOS = Value("ignore_eos", "TYPE_BOOL")

INPUTS = (
    TEXT, IDS, STREAM, CHAT, MAX_TOKENS, TEMPERATURE, TOP_K, TOP_P, REPETITION_PENALTY, SEED, STOP,
    IGNORE_EOS,
)  # fmt: skip
"""All of them are optional."""

TEXT_OUTPUT = Value("text_output", "TYPE_STRING")
TOKEN_IDS = Value("token_ids", "TYPE_INT64", many=True)
FINISH_REASON = Value("finish_reason", "TYPE_STRING")

OUTPUTS = (TEXT_OUTPUT, TOKEN_IDS, FINISH_REASON)


class Given:
    """The inputs of a request.

    Args:
        server: the module ``triton_python_backend_utils``.
        request: an ``InferenceRequest`` of it.
    """

    def __init__(self, server: Any, request: Any) -> None:
        self._server = server
        self._request = request

    def many(self, value: Value) -> list[Any] | None:
        """All elements; None if the request lacks the input.

        Raises:
            UsageError: bytes that are no UTF-8.
        """
        tensor = self._server.get_input_tensor_by_name(self._request, value.name)
        if tensor is None:
            return None
        elements = tensor.as_numpy().reshape(-1).tolist()
        return [_text(e, value) for e in elements] if value.type == "TYPE_STRING" else elements

    def one(self, value: Value, otherwise: Any = None) -> Any:
        """The only element, or ``otherwise`` if the request lacks the input.

        Raises:
            UsageError: there are more elements, or none.
        """
        elements = self.many(value)
        if elements is None:
            return otherwise
        if len(elements) != 1:
            raise UsageError(f"{value.name} has {len(elements)} elements; give one")
        return elements[0]


def _text(element: bytes | str, value: Value) -> str:
    if isinstance(element, str):
        return element
    try:
        return element.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{value.name} is no UTF-8 ({error.reason}); send text in UTF-8") from error
