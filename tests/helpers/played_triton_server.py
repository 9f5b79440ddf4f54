"""NVIDIA Triton Inference Server as a model of its Python back end sees it: the module and its rules.

The configuration is read with the server's own schema. Requests and responses are held to it, and a response
sender to its order: nothing after the last response, and one for every request.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format

FINAL = 1
_TYPES = {
    "TYPE_STRING": np.object_,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}


class TritonModelException(Exception):  # noqa: N818
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert type(message) is str
        assert type(code) is int
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        if array.dtype.type in (np.str_, np.void):
            raise TritonModelException("use np.object_ for text")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert type(output_tensors) is list
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error


class Sender:
    """Puts what a client gets in a queue: outputs by name, an error, or None after the last."""

    def __init__(self, outputs: dict[str, tuple[str, int]]) -> None:
        self._outputs = outputs
        self.received: Queue[Any] = Queue()
        self.gone = self.broken = False
        self._closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.broken:
            raise TritonModelException("the client has gone")
        if self._closed:
            raise TritonModelException("the response sender has been closed")
        if response is None and flags != FINAL:
            raise TritonModelException("a response is missing")
        if response is not None and response.error() is not None:
            self.received.put(response.error())
        elif response is not None:
            self.received.put({t.name(): self._check(t) for t in response.output_tensors()})
        if flags == FINAL:
            self._closed = True
            self.received.put(None)

    def is_cancelled(self) -> bool:
        return self.gone

    def _check(self, tensor: Tensor) -> np.ndarray:
        kind, size = self._outputs[tensor.name()]
        array = tensor.as_numpy()
        assert array.dtype == _TYPES[kind]
        assert array.ndim == 1
        assert size in (-1, len(array))
        return array


class Request:
    def __init__(self, inputs: list[Tensor], sender: Sender) -> None:
        self._inputs, self._sender = inputs, sender

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> Sender:
        return self._sender


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def read_config(path: Path) -> Any:
    """The server's ``ModelConfig`` of a config.pbtxt.

    The schema comes with the server's client, of which only this file is run: it needs no gRPC.
    """
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("needs tritonclient (pip install -e '.[dev]')")
    (directory,) = found.submodule_search_locations or []
    file = Path(directory) / "grpc" / "model_config_pb2.py"
    name = "tritonclient_model_config_pb2"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():  # of the version of protobuf that made it
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        sys.modules[name] = module
    return text_format.Parse(path.read_text(), sys.modules[name].ModelConfig())


class PlayedServer:
    """One instance of a model of a repository."""

    def __init__(self, repository: Path, name: str) -> None:
        self.config = read_config(repository / name / "config.pbtxt")
        assert self.config.name == name
        assert self.config.backend == "python"
        assert not self.config.platform
        assert self.config.model_transaction_policy.decoupled
        as_json = json_format.MessageToJson(self.config, preserving_proto_field_name=True)
        (group,) = self.config.instance_group
        self._inputs, self._outputs = (
            {v.name: (self._type(v), v.dims[0]) for v in values if list(v.dims) == [v.dims[0]]}
            for values in (self.config.input, self.config.output)
        )
        self._required = {v.name for v in self.config.input if not v.optional}
        module = _load(repository / name / "1" / "model.py")
        self.model = module.TritonPythonModel()
        self.model.initialize(
            {
                "model_config": as_json,
                "model_instance_kind": {1: "GPU", 2: "CPU"}[group.kind],
                "model_instance_device_id": "0",
                "model_repository": str(repository / name),
                "model_version": "1",
                "model_name": name,
            }
        )

    def _type(self, value: Any) -> str:
        return str(
            value.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[value.data_type].name
        )

    def send(self, **inputs: Any) -> Sender:
        """Hand a request over, whose inputs are lists; what the server itself refuses fails the test."""
        return self.send_together([inputs])[0]

    def send_together(self, requests: list[dict[str, Any]]) -> list[Sender]:
        """Several requests in one call of ``execute``."""
        made = [Request([self._tensor(*i) for i in each.items()], Sender(self._outputs)) for each in requests]
        assert all(self._required <= set(each) for each in requests)
        assert self.model.execute(made) is None  # decoupled
        return [request.get_response_sender() for request in made]

    def _tensor(self, name: str, content: list[Any]) -> Tensor:
        kind, size = self._inputs[name]
        assert size in (-1, len(content))
        texts = [c.encode() if isinstance(c, str) else c for c in content]
        return Tensor(name, np.array(texts, _TYPES[kind]))


def answer(sender: Sender) -> list[Any]:
    """Every response of a request, the first of which may be an error."""
    responses = []
    while (response := sender.received.get(timeout=60)) is not None:
        responses.append(response)
    return responses


@contextmanager
def serving(repository: Path, name: str = "chai") -> Iterator[PlayedServer]:
    """The model from ``initialize`` to ``finalize``."""
    server = PlayedServer(repository, name)
    try:
        yield server
    finally:
        server.model.finalize()


def _load(file: Path) -> ModuleType:
    played = ModuleType("triton_python_backend_utils")
    vars(played).update(
        TritonModelException=TritonModelException,
        TritonError=TritonError,
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=get_input_tensor_by_name,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    )
    sys.modules[played.__name__] = played
    try:
        spec = importlib.util.spec_from_file_location("triton_model", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules[played.__name__]
    return module
