"""lm-eval on a local task: the same score whatever computes the logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'chai-export[quality]')")

from chai_export.clustering.clusters import Clusters
from chai_export.clustering.plan import LayerPlan, Plan
from chai_export.errors import ChaiError, UsageError
from chai_export.exporter.stage import export
from chai_export.quality.lm_eval_model import LogitsLM
from chai_export.quality.lm_eval_tasks import evaluate_tasks
from chai_export.runtime.native import find_library

MODEL = Path(__file__).parents[2] / "examples" / "pydoc-5m"
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = [
    ("This module provides", [" functions", " potatoes", " zzzz"], 0),
    ("The following example shows", [" how", " blue", " because"], 0),
    ("Return True if the", [" purple sky", " object", " 1997"], 1),
    ("Raises", [" :exc:`ValueError`", " banana bread", " seventeen"], 0),
    (".. versionadded::", [" horse", " 3.4", " the of"], 1),
    ("import", [" ;;;", " sys", " ))"], 1),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_choice.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export(MODEL, Clusters(kept_heads=(16, 16, 8, 5, 4, 4)), path)
    return path


def test_every_engine_gives_the_same_score(bundle, tasks, monkeypatch):
    torch = evaluate_tasks(bundle, ["local_choice"], backend="torch", task_path=tasks, reference=MODEL)
    monkeypatch.setenv("CHAI_EXPORT_NATIVE", "0")
    portable = evaluate_tasks(bundle, ["local_choice"], task_path=tasks)
    assert torch["tasks"] == portable["tasks"]
    scores = torch["tasks"]["local_choice"]
    assert set(scores) == {"all", "chai"}
    assert scores["all"]["acc"] > 0.6
    monkeypatch.delenv("CHAI_EXPORT_NATIVE")
    if find_library("chai_onnxruntime") is None:
        pytest.skip("the native library is not built; torch and the function body agree")
    assert evaluate_tasks(bundle, ["local_choice"], task_path=tasks)["tasks"] == torch["tasks"]


def test_a_plan_scores_the_same_in_torch_and_on_onnxruntime(tasks, tmp_path):
    bits = ((16, 8, 4), (16, 4, 4), (8, 8, 4), (5, 4, 8), (4, 8, 8), (4, 16, 4))
    layers = tuple(LayerPlan(kept_heads=r, key_bits=k, value_bits=v) for r, k, v in bits)
    export(MODEL, Plan(layers=layers, probe_tokens=16), tmp_path / "bundle")
    engines = ({"backend": "torch", "reference": MODEL}, {})
    torch, ours = (
        evaluate_tasks(tmp_path / "bundle", ["local_choice"], task_path=tasks, **engine)["tasks"][
            "local_choice"
        ]
        for engine in engines
    )
    assert torch["chai"] == ours["chai"]
    assert ours["chai"]["acc"] > 0.6


def test_an_unknown_task_and_a_missing_model_are_named(bundle, tasks, monkeypatch):
    from lm_eval import tasks as library

    manager = library.TaskManager

    def without_defaults(include_path, include_defaults=True):
        """lm-eval's own task files take half a minute to read, and hold no nonsense."""
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(library, "TaskManager", without_defaults)
    with pytest.raises(ChaiError, match="no task nonsense_task"):
        evaluate_tasks(bundle, ["nonsense_task"], task_path=tasks)
    with pytest.raises(UsageError, match="--reference"):
        evaluate_tasks(bundle, ["local_choice"], backend="torch", task_path=tasks)


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 96 if letter != " " else 27 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(" " if token == 27 else chr(token + 96) for token in ids)


def follow(ids):
    """A model that is sure each letter is followed by the next one."""
    logits = np.zeros((len(ids), 30), np.float32)
    logits[np.arange(len(ids)), [(token + 1) % 27 for token in ids]] = 50.0
    return logits


class Request:
    def __init__(self, *args):
        self.args = args


def test_likelihoods_windows_and_stop_strings_are_those_of_the_model():
    model = LogitsLM(follow, Letters(), 8, [0])
    likely, unlikely, spaced = model.loglikelihood(
        [Request("ab", "cd"), Request("ab", "dd"), Request("ab ", "a")]
    )
    assert likely[1]
    assert likely[0] == pytest.approx(0.0, abs=1e-6)
    assert not unlikely[1]
    assert unlikely[0] == pytest.approx(-100.0, abs=1.0)
    assert not spaced[1]  # the space moves to the continuation, and b is not followed by it
    assert model.loglikelihood_rolling([Request("abcdefghij")])[0] == pytest.approx(-50.0, abs=1.0)
    made = model.generate_until(
        [Request("a", {"until": ["e"], "max_gen_toks": 9}), Request("a", {"max_gen_toks": 2})]
    )
    assert made == ["bcd", "bc"]
