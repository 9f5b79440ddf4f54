"""A bundle behaves as transformers does with the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chai_export as ce

SOURCE = Path(__file__).parents[1] / "fixtures" / "models" / "llama-gqa"
TEXTS = ["w4 w9", "w5 w6 w7 w8 w9 w10 w11 w30 w31 w2x", "w12"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    layers = json.loads((SOURCE / "config.json").read_text())["num_hidden_layers"]
    clusters = {"format": "chai-clusters/1", "kept_heads": [2] * layers}
    (root / "clusters.json").write_text(json.dumps(clusters))
    return ce.export(SOURCE, root / "clusters.json", root / "bundle").path


@pytest.fixture(scope="module")
def original() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(SOURCE).eval(), AutoTokenizer.from_pretrained(SOURCE)


def test_all_heads_give_the_logits_of_the_model(bundle, original):
    model, tokenizer = original
    ids = tokenizer(TEXTS[1]).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ce.load(bundle, heads="all").logits(ids), expected, atol=1e-4)


def test_a_batch_of_texts_is_what_transformers_generates_one_by_one(bundle, original):
    model, tokenizer = original
    results = ce.load(bundle, heads="all").generate(TEXTS, max_new_tokens=24)
    for text, result in zip(TEXTS, results, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        prompt = encoded.input_ids
        whole_ids = model.generate(
            prompt, attention_mask=encoded.attention_mask, max_new_tokens=24, do_sample=False
        )
        new = whole_ids[0, prompt.shape[1] :].tolist()
        assert result.token_ids == new
        assert result.prompt_tokens == prompt.shape[1]
        assert tokenizer.decode(whole_ids[0], skip_special_tokens=True).endswith(result.text)


def test_kept_heads_shrink_the_key_cache_only(bundle):
    chai, everything = ce.load(bundle), ce.load(bundle, heads="all")
    for runner in (chai, everything):
        runner.generate(TEXTS, max_new_tokens=8)
    manifest = chai.bundle.manifest
    heads, kept = manifest.num_kv_heads, manifest.kept_heads[0]
    assert chai.kv_cache_bytes / everything.kv_cache_bytes == pytest.approx((kept + heads) / (2 * heads))
    assert chai.kv_cache_bytes_all_heads == everything.kv_cache_bytes
