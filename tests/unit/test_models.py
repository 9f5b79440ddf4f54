"""Loading models, reading their geometry, and refusing what the op cannot express."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chai_export.errors import ChaiError, UsageError
from chai_export.models.families import FAMILIES as KNOWN
from chai_export.models.families import covered_families
from chai_export.models.geometry import describe
from chai_export.models.kv_sources import describe_model
from chai_export.models.loading import load_model
from chai_export.models.oracle import require_same_with_all_heads
from chai_export.models.support import layer_ranges, unsupported_reasons
from chai_export.models.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES, family_config, family_model


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    family_model("llama-gqa").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_supported_and_described(name):
    config = family_config(name)
    assert unsupported_reasons(config) == []
    geometry = describe(config)
    assert (geometry.num_layers, geometry.num_query_heads, geometry.vocab_size) == (2, 8, 96)
    heads = 1 if name.endswith("-mqa") else FAMILIES[name][1].get("num_key_value_heads", 8)
    assert geometry.num_kv_heads == heads
    assert geometry.head_dim == geometry.value_head_dim == FAMILIES[name][1].get("head_dim", 8)
    assert geometry.context_length == 128
    ends = KNOWN[geometry.model_type].position_table
    assert geometry.max_positions == (128 if ends else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_position_table_ends_where_the_model_does(name):
    """A model with a table fails beyond it; one without, whose positions are computed, does not."""
    model = family_model(name)
    tokens = torch.arange(129)[None] % 96
    if not KNOWN[model.config.model_type].position_table:
        assert model(input_ids=tokens).logits.isfinite().all()
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)
        assert model(input_ids=tokens[:, 1:]).logits.isfinite().all()


def test_the_families_said_to_be_tested_are_those_built_here():
    said = {name: family.model_type for family in KNOWN.values() for name in family.tested}
    assert said == {name: model_type for name, (model_type, _) in FAMILIES.items()}


def test_the_readme_names_the_covered_families():
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    names = [family.name for family in covered_families()]
    assert f": {', '.join(names)}. So are " in text


def test_every_family_in_the_table_is_one_that_transformers_has():
    assert set(KNOWN) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("name", [family.model_type for family in KNOWN.values() if family.refused])
def test_a_family_refused_by_name_is_refused_with_its_reason(name):
    assert f": {KNOWN[name].refused}" in "; ".join(unsupported_reasons(of_type(name)))


def test_bytes_saved_count_the_key_cache_only():
    geometry = describe(family_config("llama-mha"))
    assert geometry.kv_bytes_saved([8, 8]) == 0.0
    assert geometry.kv_bytes_saved([4, 8]) == pytest.approx(4 * 8 / (2 * 8 * 16))


def of_type(model_type, **options):
    return AutoConfig.for_model(model_type, **options)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (of_type("falcon", alibi=True, num_hidden_layers=2), "layers 0-1: ALiBi"),
        (of_type("mpt"), "ALiBi"),
        (of_type("llama4_text", num_hidden_layers=4), "layers 0-2: 'chunked_attention'"),
        (of_type("mamba", num_hidden_layers=2), "'linear_attention'"),
        (of_type("openai-gpt", n_layer=2), "outside transformers' attention interface"),
        (of_type("qwen3_next", num_hidden_layers=4), "layers 0-2: 'linear_attention' is not causal"),
        (
            of_type("deepseek_v3", num_hidden_layers=3),
            "layers 0-2: keys and values of all heads are made",
        ),
        (of_type("minicpm3"), "one latent vector (kv_lora_rank 256)"),
        (of_type("t5"), "encoder-decoder"),
        (of_type("bert"), "not a decoder-only"),
        (of_type("vit"), "not a decoder-only"),
        (of_type("llava"), "composite"),
    ],
)
def test_what_the_op_cannot_express_is_refused_with_the_reason(config, reason):
    assert reason in "; ".join(unsupported_reasons(config))


def test_layers_with_sizes_of_their_own_are_named():
    """Gemma 4 has other heads in its full layers; transformers lets any family have such layers."""
    options = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    gemma = of_type("gemma4_text", **options, sliding_window=131072)
    assert "layers 1, 3: head_dim is 512, not 256 as in layer 0" in unsupported_reasons(gemma)
    pruned = family_config("llama-gqa", per_layer_config={1: {"num_key_value_heads": 4}})
    assert unsupported_reasons(pruned) == ["layer 1: num_key_value_heads is 4, not 2 as in layer 0"]
    narrow = family_config("llama-gqa", per_layer_config={1: {"intermediate_size": 32}})
    assert unsupported_reasons(narrow) == []


def test_heads_that_no_configuration_tells_are_noticed():
    model = family_model("llama-gqa")
    model.config.num_key_value_heads = 4
    with pytest.raises(ChaiError, match="layer 0 of this llama model has 8 query heads and 2 KV heads"):
        describe_model(model)


def test_layers_are_named_in_ranges():
    assert layer_ranges([0, 2, 3, 4, 9]) == "layers 0, 2-4, 9"
    assert layer_ranges([7]) == "layer 7"


def test_a_loaded_model_has_the_weights_and_dtype_asked_for(saved):
    model = load_model(saved, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    torch.testing.assert_close(load_model(saved).lm_head.weight, family_model("llama-gqa").lm_head.weight)


def test_a_given_model_is_not_changed_by_another_dtype():
    model = family_model("gpt2")
    assert load_model(model) is model
    assert load_model(model, dtype="float16").dtype == torch.float16
    assert model.dtype == torch.float32


def refusal(source, **options):
    with pytest.raises(ChaiError) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_directory_says_so(tmp_path):
    assert "there is no model directory" in refusal(tmp_path / "nothing")
    assert "there is no model directory" in refusal("./models/nothing/here")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file")


def test_unreachable_hub_says_so_at_once(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert "the hub cannot be reached" in refusal("nobody/this-model-does-not-exist")


def test_missing_or_broken_config_is_named(saved):
    (saved / "config.json").write_text('{"model_type": ')
    assert "config.json is not valid JSON" in refusal(saved)
    (saved / "config.json").write_text('{"model_type": "no-such-family"}')
    assert "config.json cannot be used" in refusal(saved)
    (saved / "config.json").unlink()
    assert "has no config.json" in refusal(saved)


def test_missing_or_corrupted_weights_are_named(saved):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[: len(whole) // 2], b"\xff" * 64 + whole[64:], b""):
        weights.write_bytes(damage)
        assert ("weights" if damage else "is empty") in refusal(saved)
    weights.unlink()
    assert "has no weights" in refusal(saved)


def test_weights_that_are_absent_are_not_filled_with_random_numbers(saved):
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (saved / "config.json").write_text(json.dumps(config))
    assert "lacks 9 of its weights (model.layers.2" in refusal(saved)


def test_an_encoder_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    ).save_pretrained(tmp_path)
    assert "bert is not a decoder-only language model" in refusal(tmp_path)


def test_remote_code_needs_the_flag(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "own_thing", "auto_map": {"AutoConfig": "code.Config"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "code.py").write_text("raise SystemExit('was run')")
    assert "--trust-remote-code" in refusal(saved)


def test_unknown_dtype_is_wrong_usage(saved):
    with pytest.raises(UsageError, match="float64"):
        load_model(saved, dtype="float64")


def test_errors_leave_nothing_on_the_terminal(saved, capfd):
    (saved / "model.safetensors").write_bytes(b"")
    refusal(saved)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_tokenizer_has_none(saved):
    assert load_tokenizer(saved) is None
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ChaiError, match=r"tokenizer.json is not valid JSON"):
        load_tokenizer(saved)


def test_an_untested_family_is_checked_by_numbers():
    config = AutoConfig.for_model(
        "diffllama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(ChaiError):
        require_same_with_all_heads(AutoModelForCausalLM.from_config(config).eval())
    require_same_with_all_heads(family_model("phi-gqa"))
