"""A bundle is checked when it is loaded, its engine when it is used."""

from __future__ import annotations

import json

import pytest

from chai_export.bundle import bundle as bundle_module
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.engine_record import add_engine, require_engine
from chai_export.bundle.environment import save_environment
from chai_export.bundle.exchange import exchange
from chai_export.bundle.manifest import EngineRecord
from chai_export.errors import ChaiError
from chai_export.runtime import runner as runner_module
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return TinyModel().write(tmp_path / "bundle", tokenizer=letters_tokenizer(), eos=[1, 2])


def test_every_file_is_recorded_and_loads(bundle):
    names = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert names == {*bundle.manifest.files, "manifest.json"}
    assert {"model.onnx", "tokenizer.json", "generation_config.json"} <= names


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_changed_file_is_named(bundle, name):
    path = bundle.path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChaiError, match=rf"{name} was changed .*SHA-256.*; run .*again"):
        Bundle.load(bundle.path)


def test_a_missing_file_is_named(bundle):
    bundle.model_path.unlink()
    with pytest.raises(ChaiError, match=r"model\.onnx is missing; run .*again"):
        Bundle.load(bundle.path)


def test_another_op_version_is_refused(tmp_path):
    with pytest.raises(
        ChaiError,
        match=r"has version 99 of the op and this version .* runs version 2; run `chai-export export`",
    ):
        TinyModel().write(tmp_path / "b", op_version=99)


def test_a_bundle_of_version_1_is_one_line_that_says_to_export_again(bundle):
    path = bundle.path / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("key_bits", "value_bits", "group"):
        del content[name]
    path.write_text(json.dumps({**content, "op_version": 1}))
    with pytest.raises(
        ChaiError, match=r"has version 1 of the op .* run `chai-export export`.* again"
    ) as caught:
        Bundle.load(bundle.path)
    assert "\n" not in str(caught.value)


def test_tokenizer_and_template_travel_with_the_bundle(tmp_path):
    template = "{% for m in messages %}<s>{{ m['content'] }}<end>{% endfor %}"
    written = letters_tokenizer(add_bos=True, chat_template=template)
    bundle = TinyModel().write(tmp_path / "b", tokenizer=written)
    read = bundle.tokenizer()
    assert read.chat_template == template
    assert read("hello")["input_ids"] == written("hello").input_ids
    assert bundle.manifest.generation.add_bos
    assert bundle.manifest.generation.has_chat_template


def test_a_bundle_without_tokenizer_has_none(tmp_path):
    assert TinyModel().write(tmp_path / "b").tokenizer() is None


def test_a_damaged_tokenizer_is_one_line(bundle):
    (bundle.path / "tokenizer.json").write_text("{}")
    with pytest.raises(ChaiError, match=r"tokenizer.json cannot be read") as caught:
        bundle.tokenizer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, [7, 8]),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, [0]),
        ({}, {"eos_token_id": 9}, [9]),
        ({"eos_token_id": -1}, {"eos_token_id": None}, [1]),
    ],
)
def test_eos_ids_come_from_where_transformers_takes_them(tmp_path, generation, config, expected):
    settings = save_environment(
        tmp_path, tokenizer=letters_tokenizer(), config=config, generation_config=generation
    )
    assert settings.eos_token_ids == expected
    assert settings.bos_token_id == 0
    assert not settings.add_bos


def test_generation_defaults_are_kept(tmp_path):
    from transformers import GenerationConfig

    config = GenerationConfig(top_k=7, top_p=0.9, repetition_penalty=1.1, eos_token_id=[3])
    settings = save_environment(tmp_path, generation_config=config)
    assert (settings.top_k, settings.top_p, settings.repetition_penalty) == (7, 0.9, 1.1)
    assert GenerationConfig.from_pretrained(tmp_path).top_k == 7


def record(bundle: Bundle, **changes: object) -> EngineRecord:
    values = {
        "backend": "tensorrt",
        "runtime_version": "11.1",
        "gpu_architecture": "sm_90",
        "plugin_version": "1",
        "op_version": 2,
        "model_sha256": bundle.manifest.files["model.onnx"].sha256,
        "max_batch": 1,
        "max_seq": 8,
        "created_with": "tests",
        **changes,
    }
    return EngineRecord.model_validate(values)


HERE = {
    "runtime": "TensorRT",
    "runtime_version": "11.1",
    "gpu_architecture": "sm_90",
    "plugin_version": "1",
}


def test_an_engine_that_fits_is_returned(bundle):
    add_engine(bundle, record(bundle))
    assert require_engine(Bundle.load(bundle.path), "tensorrt", **HERE) == record(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime_version": "10.3"}, "built for TensorRT version 10.3 and this is 11.1"),
        ({"gpu_architecture": "sm_80"}, "built for GPU architecture sm_80 and this is sm_90"),
        ({"plugin_version": "2"}, "built for plugin version 2 and this is 1"),
        ({"op_version": 1}, "built for op version 1 and this is 2"),
        ({"model_sha256": "0" * 64}, "built from another model.onnx"),
        ({"files": {"engines/plan": {"sha256": "0" * 64, "size": 1}}}, "plan is missing"),
    ],
)
def test_an_engine_that_does_not_fit_says_what_to_run_again(bundle, change, message):
    changed = add_engine(bundle, record(bundle, **change))
    with pytest.raises(ChaiError, match=rf"{message}; run `chai-export build .* --backend tensorrt` again"):
        require_engine(changed, "tensorrt", **HERE)


def test_engines_that_two_processes_enter_are_both_kept(bundle):
    same = Bundle.load(bundle.path)
    add_engine(bundle, record(bundle))
    add_engine(same, record(bundle, backend="onnxruntime"))
    assert set(Bundle.load(bundle.path).manifest.engines) == {"tensorrt", "onnxruntime"}


def test_an_engine_of_a_bundle_that_was_replaced_meanwhile_is_not_entered(bundle):
    other = TinyModel(kept=(1, 1)).write(bundle.path)
    with pytest.raises(ChaiError, match=r"bundle was replaced while its tensorrt engine was built; run"):
        add_engine(bundle, record(bundle))
    assert Bundle.load(bundle.path).manifest == other.manifest


def test_a_bundle_that_is_replaced_while_it_is_checked_is_read_anew(bundle, monkeypatch):
    other = TinyModel(kept=(1, 1)).write(bundle.path.with_name("other"))
    check, replaced = bundle_module.check_files, []

    def replace_first(*arguments: object, **options: object) -> None:
        if not replaced:
            replaced.append(exchange(other.path, bundle.path))
        check(*arguments, **options)

    monkeypatch.setattr(bundle_module, "check_files", replace_first)
    assert Bundle.load(bundle.path).manifest == (other if replaced == [True] else bundle).manifest


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_anew(bundle, monkeypatch):
    open_session, replaced = runner_module.open_session, []

    def replace_after(*arguments: object, **options: object) -> object:
        session = open_session(*arguments, **options)
        if not replaced:
            replaced.append(TinyModel(kept=(1, 1)).write(bundle.path))
        return session

    monkeypatch.setattr(runner_module, "open_session", replace_after)
    runner = runner_module.load(bundle.path)
    assert runner.bundle.manifest == replaced[0].manifest
    assert TinyModel(kept=(1, 1)).greedy([5, 6, 7], 2) == runner.generate([[5, 6, 7]], 2)[0].token_ids


def test_a_missing_engine_says_what_to_run(bundle):
    with pytest.raises(ChaiError, match="has no tensorrt engine; run `chai-export build"):
        require_engine(bundle, "tensorrt", **HERE)
