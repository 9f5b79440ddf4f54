"""Public functions refuse arguments of another kind by name, in one line, before any work."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chai_export as ce
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

MODEL = Path(__file__).parents[1] / "fixtures" / "models" / "llama-mha"

KINDS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "float": lambda: 2.5,
    "NaN": lambda: float("nan"),
    "True": lambda: True,
    "bytes": lambda: b"12",
    "numeric text": lambda: "7",
    "generator": lambda: (i for i in (1, 2)),
    "dictionary": lambda: {1: 2},
    "object": object,
    "half a surrogate pair": lambda: "\ud800",
    "NUL": lambda: "a\0b",
    "empty text": lambda: "",
    "a list of floats": lambda: [1.5],
    "a list of texts": lambda: ["1"],
    "a list of None": lambda: [None],
    "a list of lists": lambda: [[1]],
    "an array of floats": lambda: np.zeros(2),
    "a table": lambda: np.zeros((2, 2), np.int64),
    "a huge number": lambda: 10**30,
    "a list of huge numbers": lambda: [10**30],
    "a negative number": lambda: -1,
    "a list of negative numbers": lambda: [-1],
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModel().write(tmp_path_factory.mktemp("api") / "bundle", tokenizer=letters_tokenizer()).path


@pytest.fixture(scope="module")
def runner(bundle: Path) -> ce.Runner:
    return ce.load(bundle)


def refuses(call: Callable[[Any], object], *, but: Collection[str] = ()) -> None:
    """Every kind but those in ``but`` ends in one line."""
    for kind, make in KINDS.items():
        if kind in but:
            continue
        try:
            answer: object = call(make())
        except Exception as error:
            answer = error
        assert isinstance(answer, ce.ChaiError), (kind, answer)
        assert "\n" not in str(answer), kind


TEXTS = {"numeric text", "NUL"}


def test_prompts(runner: ce.Runner) -> None:
    refuses(lambda v: runner.generate(v, 1), but={"a list of texts", "a list of lists", "a table"})
    refuses(lambda v: runner.generate([v], 1), but=TEXTS)
    refuses(runner.logits)


def test_ids_of_any_library_are_taken(runner: ce.Runner) -> None:
    torch = pytest.importorskip("torch")
    expected = runner.generate([[1, 2, 3]], 2)[0].token_ids
    for prompt in ((1, 2, 3), range(1, 4), np.array([1, 2, 3], np.int16), torch.tensor([1, 2, 3])):
        made = runner.generate([prompt], 2)[0]
        assert made.token_ids == expected
        assert made.prompt == [1, 2, 3]
    made = runner.generate((prompt for prompt in ([1, 2, 3], [1, 2, 3])), 2)
    assert [generation.token_ids for generation in made] == [expected, expected]


def test_settings_of_a_call(runner: ce.Runner) -> None:
    refuses(lambda v: runner.generate([[1, 2]], v))
    refuses(lambda v: runner.generate([[1, 2]], 1, max_seq=v), but={"None"})
    refuses(lambda v: runner.generate([[1, 2]], 1, temperature=v), but={"float", "a huge number"})
    refuses(lambda v: runner.generate([[1, 2]], 1, top_k=v), but={"None"})
    refuses(lambda v: runner.generate([[1, 2]], 1, seed=v), but={"None"})
    refuses(lambda v: runner.generate([[1, 2]], 1, stop=v), but={"a list of texts"})
    refuses(lambda v: runner.generate([[1, 2]], 1, on_text=v), but={"None"})
    refuses(lambda v: runner.logits([1, 2, 3], v), but={"None"})
    refuses(lambda v: ce.load(runner.bundle.path, max_batch=v), but={"None"})
    refuses(lambda v: ce.load(runner.bundle.path, threads=v))


def test_paths(bundle: Path, tmp_path: Path) -> None:
    clusters = ce.Clusters((1, 1))
    refuses(ce.load)
    refuses(ce.Bundle.load)
    refuses(ce.build)
    refuses(ce.Clusters.load)
    refuses(lambda v: ce.evaluate(v, [1, 2]))
    refuses(lambda v: ce.verify(v, MODEL))
    refuses(lambda v: ce.verify(bundle, v))
    refuses(lambda v: ce.export(v, clusters, tmp_path / "b"))
    refuses(lambda v: ce.export(tmp_path / "none", v, tmp_path / "b"))
    refuses(lambda v: ce.export(tmp_path / "none", clusters, v))
    refuses(lambda v: ce.rewrite(v, clusters, tmp_path / "b"))
    refuses(lambda v: ce.rewrite(bundle / "model.onnx", clusters, v))
    refuses(lambda v: ce.rewrite(bundle / "model.onnx", clusters, tmp_path / "b", tokenizer=v))
    refuses(lambda v: ce.calibrate(v, "text"))
    assert list(tmp_path.iterdir()) == []


def test_numbers(bundle: Path, tmp_path: Path) -> None:
    clusters, none = ce.Clusters((1, 1)), tmp_path / "none"
    refuses(lambda v: ce.export(none, clusters, tmp_path / "b", probe_tokens=v))
    refuses(lambda v: ce.rewrite(none, clusters, tmp_path / "b", probe_tokens=v))
    refuses(lambda v: ce.calibrate(none, "text", samples=v))
    refuses(lambda v: ce.calibrate(none, "text", seq_len=v))
    refuses(lambda v: ce.calibrate(none, "text", probe_tokens=v))
    refuses(lambda v: ce.calibrate(none, "text", keep=v))
    refuses(lambda v: ce.verify(none, MODEL, new_tokens=v))
    refuses(lambda v: ce.verify(none, MODEL, tolerance=v))
    for name in ("window", "max_tokens", "prompts", "new_tokens"):
        refuses(lambda v, name=name: ce.evaluate(none, "text", **{name: v}))
    refuses(lambda v: ce.build(bundle, max_batch=v))


def test_texts(runner: ce.Runner) -> None:
    refuses(lambda v: ce.calibrate(MODEL, v, samples=1, seq_len=24))
    refuses(lambda v: ce.calibrate(MODEL, [v], samples=1, seq_len=24))
    for text in ([5] * 50 + [80], [5] * 50 + [2**31 - 1]):
        with pytest.raises(ce.ChaiError, match="not in the model's vocabulary of 80"):
            ce.calibrate(MODEL, text, samples=1, seq_len=24)
