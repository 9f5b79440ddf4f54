"""The runner against the op's reference: every way to feed a text gives the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime import onnxruntime_session
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.runner import Runner
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

MODEL = TinyModel(positions=400)
GROUPED = TinyModel(heads=6, kv_heads=3, kept=(1, 2), head_dim=4, value_dim=8, positions=400)
SHARED = TinyModel(heads=6, kv_heads=3, kept=(2, 1, 2), sources=(0, 1, 0), positions=400)
TOLERANCE = 1e-4
SHORT, MIDDLE, LONG = [5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    tokenizer = letters_tokenizer()
    return {
        "mha": MODEL.write(root / "mha", tokenizer=tokenizer).path,
        "gqa": GROUPED.write(root / "gqa").path,
        "shared": SHARED.write(root / "shared").path,
        "eos": MODEL.write(root / "eos", tokenizer=tokenizer, eos=[1, 15, 31]).path,
    }


@pytest.fixture(scope="module")
def runner(implementation: str, bundles: dict[str, Path]) -> Runner:
    return ce.load(bundles["mha"])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new caches with NaN."""
    real = onnxruntime_session.KvCache

    def poisoned_cache(*arguments: object) -> object:
        cache = real(*arguments)  # type: ignore[arg-type]
        for array in cache.arrays.values():
            array[...] = np.nan
        return cache

    monkeypatch.setattr(onnxruntime_session, "KvCache", poisoned_cache)


@pytest.mark.parametrize(
    ("chunks", "message"), [([4, 25], "first chunk has 4"), ([5, 5], "do not divide"), ([29, 0], "do not")]
)
def test_wrong_chunks_are_refused(runner, chunks, message):
    with pytest.raises(UsageError, match=message):
        runner.logits(LONG, chunks=chunks)


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", ["mha", "gqa", "shared"])
def test_texts_of_a_mixed_batch_are_those_of_the_reference(implementation, bundles, name, heads):
    """Prompts shorter than the probe are fed afresh while the others decode."""
    model = {"mha": MODEL, "gqa": GROUPED, "shared": SHARED}[name]
    prompts = [SHORT, LONG, [11], MIDDLE]
    runner = ce.load(bundles[name], heads=heads)
    results = runner.generate(prompts, max_new_tokens=16)
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert result.token_ids == model.greedy(prompt, 16, heads)
        fed = [*prompt, *result.token_ids[:-1]]
        assert np.array_equal(runner.head_maps[:, row], model.reference(fed, heads)[1][:, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_batch", [2, 3, 8])
def test_a_text_does_not_depend_on_its_neighbours(implementation, bundles, max_batch, temperature):
    prompts = [LONG, SHORT, MIDDLE, [11], LONG[:7]]
    runner = ce.load(bundles["mha"], max_batch=max_batch)
    settings = {"max_new_tokens": 9, "temperature": temperature, "seed": 4}
    together = runner.generate(prompts, **settings)
    maps = runner.head_maps
    for row, prompt in enumerate(prompts):
        assert runner.generate([prompt], **settings) == [together[row]]
        assert np.array_equal(runner.head_maps[:, 0], maps[:, row])


@pytest.mark.usefixtures("poisoned")
def test_what_the_cache_held_before_changes_nothing(implementation, bundles):
    runner = ce.load(bundles["mha"], max_batch=2)
    results = runner.generate([SHORT, LONG, MIDDLE], max_new_tokens=8)
    for prompt, result in zip([SHORT, LONG, MIDDLE], results, strict=True):
        assert result.token_ids == MODEL.greedy(prompt, 8)


@pytest.mark.usefixtures("poisoned")
def test_only_the_new_positions_of_a_cache_are_written(implementation, bundles):
    session = OnnxRuntimeSession(Bundle.load(bundles["mha"]), page_length=16)
    session.begin(2, 16)
    step(session, [[4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17]], lengths=[7, 5], past=[0, 0])
    step(session, [[11, 12], [13, 14]], lengths=[1, 2], past=[7, 5])
    for name, array in session.caches[0].arrays.items():
        written = np.isfinite(array).all(axis=3)
        used = written.any(axis=2)
        for (page,), tokens in zip(session.pool.table([0, 1]), [8, 7], strict=True):
            assert np.array_equal(written[page].all(axis=0) | ~used[page].all(), np.arange(16) < tokens), name


def step(session, ids, lengths, past):
    arrays = np.array(ids), np.array(lengths, np.int32), np.array(past, np.int32)
    return session.step(*arrays, np.maximum(arrays[1] - 1, 0).astype(np.int64)[:, None])[:, 0]


def test_padding_and_capacity_make_no_difference(implementation, bundles):
    session = OnnxRuntimeSession(Bundle.load(bundles["mha"]))
    results = []
    for capacity, padding in [(10, []), (64, [3, 3]), (100, [39] * 5)]:
        session.begin(1, capacity)
        first = step(session, [LONG[:8] + padding], [8], [0])
        results.append((first, step(session, [[12, *padding]], [1], [8])))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=TOLERANCE)


def test_an_inactive_row_beyond_its_capacity_is_left_alone(implementation, bundles):
    session = OnnxRuntimeSession(Bundle.load(bundles["mha"]))
    session.begin(2, 16)
    step(session, [LONG[:12], LONG[:12]], [12, 12], [0, 0])
    maps = session.head_map
    step(session, [LONG[:6], LONG[12:18]], [6, 0], [0, 12])
    assert np.array_equal(session.head_map[:, 1], maps[:, 1])
    logits = step(session, [[0], [33]], [0, 1], [6, 12])
    np.testing.assert_allclose(logits[1], MODEL.reference([*LONG[:12], 33])[0][-1], atol=TOLERANCE)


def test_caches_grow_while_texts_do(runner):
    (result,) = runner.generate([SHORT], max_new_tokens=150)
    assert len(result.token_ids) == 150
    ids = [*SHORT, *result.token_ids]
    greedy = runner.logits(ids).argmax(-1)
    assert greedy[len(SHORT) - 1 : -1].tolist() == result.token_ids


@pytest.mark.parametrize(("chunk", "expected"), [(7, [7, 7, 7, 7, 1, 1, 1]), (3, [5, 5, 5, 5, 5, 4, 1, 1])])
def test_long_prompts_are_prefilled_in_chunks_that_cover_the_probe(runner, monkeypatch, chunk, expected):
    from chai_export.runtime import scheduler

    lengths: list[int] = []
    real = runner.session.step
    monkeypatch.setattr(scheduler, "LONGEST_CHUNK", chunk)
    monkeypatch.setattr(runner.session, "step", lambda *a: (lengths.append(a[0].shape[1]), real(*a))[1])
    (result,) = runner.generate([LONG], max_new_tokens=3)
    assert lengths == expected
    assert result.token_ids == MODEL.greedy(LONG, 3)


def test_several_eos_ids_end_a_text(implementation, bundles):
    expected = MODEL.greedy(MIDDLE, 64)
    end = min(i for i, token in enumerate(expected) if token in (1, 15, 31))
    runner = ce.load(bundles["eos"])
    (result,) = runner.generate([MIDDLE])
    assert (result.stop_reason, result.token_ids) == ("eos", expected[: end + 1])
    assert result.text == runner.tokenizer.decode(expected[:end])
    (longer,) = runner.generate([MIDDLE], max_new_tokens=20, ignore_eos=True)
    assert (longer.stop_reason, longer.token_ids) == ("length", expected[:20])


def test_a_stop_string_across_tokens_ends_a_text(runner):
    (free,) = runner.generate(["hello"], max_new_tokens=12)
    stop = free.text[4:6]
    shown: list[str] = []
    (result,) = runner.generate(["hello"], stop=["zzzz", stop], on_text=lambda _, t: shown.append(t))
    assert result.stop_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)] == "".join(shown)
    assert result.token_ids == free.token_ids[: len(result.token_ids)]


def test_streamed_text_is_the_text(runner):
    shown: dict[int, str] = {0: "", 1: ""}
    results = runner.generate(
        ["hello", "good day"], temperature=1.5, seed=3, on_text=lambda i, t: shown.update({i: shown[i] + t})
    )
    assert [r.text for r in results] == list(shown.values())
    assert [r.text for r in results] == [runner.tokenizer.decode(r.token_ids, True) for r in results]


def test_a_seed_decides_a_sampled_text(runner):
    def text(seed: int) -> list[int]:
        return runner.generate([MIDDLE], 20, temperature=1.0, top_p=0.9, seed=seed)[0].token_ids

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_room_for_no_more_tokens_ends_a_text(runner):
    (result,) = runner.generate([MIDDLE], max_seq=10)
    assert (result.stop_reason, result.token_ids) == ("capacity", MODEL.greedy(MIDDLE, 5))
    (full,) = runner.generate([MIDDLE], max_seq=6)
    assert (full.stop_reason, len(full.token_ids)) == ("capacity", 1)
    assert runner.session.capacity == 6


def test_learned_positions_end_a_text(runner):
    (result,) = runner.generate([[4] * 398], max_new_tokens=9)
    assert (result.stop_reason, len(result.token_ids)) == ("capacity", 3)


def test_prompts_that_do_not_fit_name_the_flag(runner):
    with pytest.raises(ChaiError, match=r"has 6 tokens and 5 fit; .*--max-seq"):
        runner.generate([SHORT, MIDDLE], max_seq=5)
    for call in (runner.logits, lambda ids: runner.generate([ids])):
        with pytest.raises(ChaiError, match=r"has 401 tokens and 400 fit; .*learned no more positions"):
            call([4] * 401)


def test_wrong_arguments_are_refused(runner, bundles):
    with pytest.raises(UsageError, match="--max-new-tokens"):
        runner.generate([SHORT], max_new_tokens=0)
    with pytest.raises(UsageError, match="give a list"):
        runner.generate("text")
    with pytest.raises(UsageError, match="heads is 'some'"):
        ce.load(bundles["mha"], heads="some")
    with pytest.raises(UsageError, match="--stop needs text"):
        ce.load(bundles["gqa"]).generate([SHORT], stop=["x"])
    assert runner.generate([]) == []


def test_without_tokenizer_there_are_ids_and_no_text(implementation, bundles):
    (result,) = ce.load(bundles["gqa"]).generate([MIDDLE], max_new_tokens=4)
    assert result.text is None
    assert result.token_ids == GROUPED.greedy(MIDDLE, 4)


def bits(layers: int) -> dict[str, list[int]]:
    return {name: [0] * layers for name in ("key_bits", "value_bits")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 9}, r"past_key\.0 is .* should be"),
        ({"num_layers": 3, "kept_heads": [2, 3, 3], **bits(3)}, r"lacks past_key\.2"),
        ({"num_layers": 1, "kept_heads": [2], **bits(1)}, r"has past_key\.1"),
        ({"dtype": "float16"}, "should be float16"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest_is_refused(tmp_path, change, message):
    bundle = MODEL.write(tmp_path / "b", **change)
    with pytest.raises(ChaiError, match=rf"does not fit its manifest.*{message}.*again"):
        OnnxRuntimeSession(bundle)
