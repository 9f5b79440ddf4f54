"""The packaged model under a played Triton Inference Server: each text as the runner makes it alone."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import chai_export as ce
from chai_export.bundle.bundle import MODEL_FILE, Bundle, record_files
from chai_export.bundle.engine_record import add_engine
from chai_export.bundle.manifest import EngineRecord
from chai_export.cli.main import main
from chai_export.errors import ChaiError
from chai_export.runtime import tensorrt_session
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.tensorrt_session import TensorRtSession
from tests.helpers.fake_tensorrt import TENSORRT, FakeEngine, HostDevice
from tests.helpers.played_triton_server import Sender, TritonError, answer, read_config, serving
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

MODEL = TinyModel(positions=400, bits=(8, 4))
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}!"
TEXTS = ["the cat", "a dog sat", "the cat sat on the mat and", "x"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = letters_tokenizer(chat_template=TEMPLATE)
    return MODEL.write(tmp_path_factory.mktemp("made") / "bundle", tokenizer=tokenizer, eos=[1]).path


def package(bundle: Path, out: Path, *options: object) -> Path:
    arguments = ["package", str(bundle), "--triton-server", str(out), *map(str, options)]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(bundle, tmp_path_factory.mktemp("out") / "models", "--max-rows", 3, "--max-seq", 120)


def whole(sender: Sender) -> tuple[list[int], str, str]:
    """Tokens, text and end of an answer, in however many responses it came."""
    responses = answer(sender)
    assert not [r.message() for r in responses if isinstance(r, TritonError)]
    tokens = [int(token) for r in responses for token in r["token_ids"]]
    text = "".join(r["text_output"][0].decode() for r in responses)
    *early, last = (r["finish_reason"][0].decode() for r in responses)
    assert not any(early)
    return tokens, text, last


def alone(bundle: Path, prompt: Any, **options: Any) -> tuple[list[int], str | None, str]:
    (made,) = ce.load(bundle).generate([prompt], **options)
    return made.token_ids, made.text, made.stop_reason


def test_many_requests_at_once_give_the_texts_of_the_runner(bundle, repository):
    """Text and token ids, streamed and whole, greedy and seeded, on three rows of one cache."""
    requests, expected = [], []
    for number, text in enumerate(TEXTS * 3):
        seeded = {"temperature": [1.0], "seed": [number], "top_k": [9]} if number % 3 else {}
        prompt = {"input_ids": [5 + number, 9, 7]} if number % 4 == 3 else {"text_input": [text]}
        requests.append({**prompt, **seeded, "max_tokens": [20], "stream": [bool(number % 2)]})
        given = {name: value[0] for name, value in seeded.items()}
        asked = prompt.get("input_ids") or text
        expected.append(alone(bundle, asked, max_new_tokens=20, **given))
    with serving(repository) as server:
        senders = server.send_together(requests)
        assert [whole(sender) for sender in senders] == expected
        model = server.model._model._model
        assert model.engine.batch.counts.texts == len(requests)
        assert model.engine.rows == 3
        assert model.engine.batch.pages[0] == 3  # three rows of 120 tokens


def test_a_stream_has_a_response_for_each_token_and_a_whole_answer_one(bundle, repository):
    tokens, *_ = alone(bundle, "the cat", max_new_tokens=6, ignore_eos=True)
    with serving(repository) as server:
        asked = {"text_input": ["the cat"], "max_tokens": [6], "ignore_eos": [True]}
        streamed = answer(server.send(**asked, stream=[True]))
        (one,) = answer(server.send(**asked))
    assert [list(response["token_ids"]) for response in streamed] == [*([t] for t in tokens), []]
    assert list(one["token_ids"]) == tokens
    assert one["finish_reason"][0] == b"length"


def test_stops_and_chats_are_those_of_the_runner(bundle, repository):
    text = alone(bundle, "the cat", max_new_tokens=30, ignore_eos=True)[1]
    assert text is not None
    stop = text[3:5]
    with serving(repository) as server:
        given = server.send(text_input=["the cat"], max_tokens=[30], ignore_eos=[True], stop=["zzzz", stop])
        assert whole(given) == alone(
            bundle, "the cat", max_new_tokens=30, ignore_eos=True, stop=["zzzz", stop]
        )
        chat = server.send(text_input=["the cat"], chat=[True], max_tokens=[9], repetition_penalty=[1.5])
        assert whole(chat) == alone(bundle, "the cat", chat=True, max_new_tokens=9, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either text_input or input_ids"),
        ({"text_input": ["a"], "input_ids": [5]}, "give either text_input or input_ids"),
        ({"text_input": [""]}, "a prompt is empty"),
        ({"text_input": [b"\xff"]}, "text_input is no UTF-8"),
        ({"input_ids": [5, 4000]}, "token id 4000 is not in the model's vocabulary"),
        ({"input_ids": [5] * 121}, "a prompt has 121 tokens and 120 fit"),
        ({"text_input": ["a"], "temperature": [-1.0]}, "temperature is -1.0; give"),
        ({"text_input": ["a"], "max_tokens": [0]}, "max_tokens is 0; give at least 1"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_answer_and_no_others(bundle, repository, inputs, message):
    with serving(repository) as server:
        wrong, right = server.send_together([inputs, {"text_input": ["the cat"], "max_tokens": [3]}])
        (error,) = answer(wrong)
        assert message in error.message()
        assert error.code() == TritonError.INVALID_ARG
        assert whole(right) == alone(bundle, "the cat", max_new_tokens=3)


def test_a_request_that_finds_no_place_is_told_so(bundle, tmp_path, monkeypatch):
    step, go_on = OnnxRuntimeSession.step, Event()
    monkeypatch.setattr(OnnxRuntimeSession, "step", lambda *given: go_on.wait(60) and step(*given))
    out = package(bundle, tmp_path / "out", "--max-rows", 1, "--max-waiting", 0)
    with serving(out) as server:
        first, second = server.send_together([{"text_input": ["the cat"], "max_tokens": [50]}] * 2)
        (error,) = answer(second)
        assert error.code() == TritonError.UNAVAILABLE
        assert "0 texts are waiting already" in error.message()
        go_on.set()
        assert whole(first)[0]


def test_a_cancelled_request_gives_its_row_to_the_next(repository):
    with serving(repository) as server:
        asked = {"text_input": ["the cat"], "ignore_eos": [True], "stream": [True], "max_tokens": [100]}
        first = server.send(**asked)
        first.received.get(timeout=60)
        first.gone = True
        *_, last = answer(first)
        counts = server.model._model._model.engine.batch.counts
        if isinstance(last, TritonError):  # a machine may be so fast that the text had ended
            assert last.code() == TritonError.CANCELLED
            assert counts.aborted == 1
        assert whole(server.send(**{**asked, "max_tokens": [4]}))[0]


def test_a_client_that_cannot_be_reached_is_let_go(repository):
    with serving(repository) as server:
        lost = server.send(text_input=["the cat"], ignore_eos=[True], stream=[True], max_tokens=[100])
        lost.broken = True
        assert whole(server.send(text_input=["the cat"], max_tokens=[4]))[0]
    assert not server.model._model._open


def test_the_configuration_is_the_servers(bundle, repository):
    config = read_config(repository / "chai" / "config.pbtxt")
    assert [value.name for value in config.output] == ["text_output", "token_ids", "finish_reason"]
    assert all(value.optional for value in config.input)
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "backend": "onnxruntime", "heads": "chai", "max_rows": "3", "max_seq": "120",
    }  # fmt: skip
    copied = Bundle.load(repository / "chai" / "1" / "bundle")
    assert copied.manifest.files == Bundle.load(bundle).manifest.files


def test_settings_may_be_edited_and_a_wrong_one_is_named(bundle, tmp_path):
    out = package(bundle, tmp_path / "out", "--max-rows", 2)
    config = out / "chai" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "2"', 'string_value: "two"'))
    with pytest.raises(ChaiError, match=r"max_rows of config\.pbtxt is 'two'"), serving(out):
        pass


def test_a_bundle_without_tokenizer_takes_and_makes_ids(tmp_path):
    path = MODEL.write(tmp_path / "bare").path
    with serving(package(path, tmp_path / "out")) as server:
        tokens, text, _ = whole(server.send(input_ids=[5, 9, 7], max_tokens=[5], ignore_eos=[True]))
        assert tokens == MODEL.greedy([5, 9, 7], 5)
        assert text == ""
        (error,) = answer(server.send(text_input=["a"]))
        assert "has no tokenizer" in error.message()


@pytest.fixture
def built(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with an engine that ONNX Runtime plays, for 3 rows of 64 tokens in pages of 8."""
    made = MODEL.write(tmp_path / "built", tokenizer=letters_tokenizer(), eos=[1])
    plan = made.path / "engines" / "tensorrt" / "engine.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"a plan")
    record = EngineRecord(
        backend="tensorrt",
        runtime_version="11.4.0.106",
        model_sha256=made.manifest.files[MODEL_FILE].sha256,
        max_batch=3,
        max_seq=64,
        op_version=2,
        gpu_architecture="sm_90",
        plugin_version="2",
        files=record_files(plan.parent, made.path),
        created_with="test",
    )

    def open_played(bundle: Bundle, heads: str, *, cache_memory: int | None = None) -> TensorRtSession:
        return TensorRtSession(
            bundle.manifest,
            heads,
            FakeEngine(bundle, 3, 64, 8),
            tensorrt=TENSORRT,
            device=HostDevice(),  # type: ignore[arg-type]
            cache_memory=cache_memory,
        )

    monkeypatch.setattr(tensorrt_session, "open_tensorrt_session", open_played)
    return add_engine(made, record)


def test_an_engine_serves_many_on_one_cache(built, tmp_path, monkeypatch):
    """Beginnings are shared on the device, and limits are the engine's."""
    devices: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", devices.append)
    out = package(built.path, tmp_path / "out")
    config = read_config(out / "chai" / "config.pbtxt")
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert config.parameters["backend"].string_value == "tensorrt"
    stem = [5, 9, 7, 8, 20, 21, 6, 30, 31, 10, 11, 12, 5, 6, 7, 8, 9, 20]
    prompts = [stem, [*stem, 4], [*stem[:13], 22, 23], [7, 6], stem]
    with serving(out) as server:
        for prompt in prompts * 2:
            tokens, *_ = whole(server.send(input_ids=prompt, max_tokens=[12], ignore_eos=[True]))
            assert tokens == MODEL.greedy(prompt, 12)
        together = [{"input_ids": p, "max_tokens": [12], "ignore_eos": [True]} for p in prompts]
        for prompt, sender in zip(prompts, server.send_together(together), strict=True):
            assert whole(sender)[0] == MODEL.greedy(prompt, 12)
        engine = server.model._model._model.engine
        assert engine.rows == 3
        assert engine.batch.counts.reused_tokens > 0
        (error,) = answer(server.send(input_ids=[5] * 65))
        assert "65 tokens and 64 fit; shorten it, or build for more with `chai-export" in error.message()
    assert devices == [0]
    copied = Bundle.load(out / "chai" / "1" / "bundle").manifest
    assert copied.engines == built.manifest.engines


def test_more_rows_than_an_engine_has_are_refused(built, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    out = package(built.path, tmp_path / "out", "--max-rows", 4)
    with (
        pytest.raises(ChaiError, match=r"--max-rows is 4 and the tensorrt engine was built for 3"),
        serving(out),
    ):
        pass


def test_it_is_written_again_but_nothing_of_others_is_replaced(bundle, tmp_path, capsys):
    package(bundle, tmp_path / "out", "--name", "one")
    package(bundle, tmp_path / "out", "--name", "two")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["chai-repository.json", "two"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    assert main(["package", str(bundle), "--triton-server", str(tmp_path / "mine")]) == 1
    assert "will not be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--name", "a/b"), 2, "--name 'a/b' cannot name a model"),
        (("--backend", "tensorrt"), 1, "has no tensorrt engine; run `chai-export build"),
        (("--max-rows", "0"), 2, "--max-rows is 0"),
        (("--cache-memory", "much"), 2, "--cache-memory"),
    ],
)
def test_what_cannot_be_packaged_is_one_line(bundle, tmp_path, capsys, options, code, message):
    assert main(["package", str(bundle), "--triton-server", str(tmp_path / "out"), *options]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_engine_that_was_changed_is_not_packaged(built, tmp_path, capsys):
    (built.path / "engines" / "tensorrt" / "engine.plan").write_bytes(b"changed")
    assert main(["package", str(built.path), "--triton-server", str(tmp_path / "out")]) == 1
    assert "engine.plan was changed" in capsys.readouterr().err


def test_the_command_tells_how_to_start_the_server(bundle, tmp_path, capsys):
    out = package(bundle, tmp_path / "out", "--json", "--name", "tiny")
    assert json.loads(capsys.readouterr().out) == {
        "directory": str(out),
        "model": "tiny",
        "backend": "onnxruntime",
        "command": f"tritonserver --model-repository={out}",
    }
