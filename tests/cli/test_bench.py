"""`chai-export bench`: every figure is there and of the kind that its name says."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from chai_export.bench import machine
from chai_export.bench.clustered import clustered_head_attention
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Problem, Shape, head_map
from chai_export.bench.timing import interleaved
from chai_export.bundle.bundle import Bundle
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession

needs_library = pytest.mark.skipif(
    find_library(ONNXRUNTIME_LIBRARY) is None, reason="libchai_onnxruntime.so was not built"
)
PEERS = ["ort_attention", "ort_gqa", "ort_gqa_float16", "ort_gqa_int4", "ort_gqa_int8", "torch_sdpa"]
SMALL = ("--length", 96, "--heads", 8, "--head-dim", 16, "--seconds", 0, "--threads", 1)


@needs_library
def test_attention_compares_the_op_with_every_peer(command):
    outcome = command("bench", "attention", *SMALL, "--kv-heads", 4, "--kept", 2, "--batch", 2, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert result["read_bandwidth_gb_s"] > 0
    assert [case["phase"] for case in result["cases"]] == ["decode", "prefill"]
    for case in result["cases"]:
        assert (case["B"], case["H"], case["G"], case["R"], case["D"], case["T"]) == (2, 8, 4, 2, 16, 96)
        assert case["ceiling"] == pytest.approx(8 / 6)
        assert (case["key_bits"], case["value_bits"]) == (0, 0)
        assert case["skipped"] == {}
        assert sorted(case["peers_ms"]) == ["chai_all_heads", *PEERS]
        best = min(case["peers_ms"].values())
        assert case["peers_ms"][case["best_peer"]] == best
        assert case["speedup_vs_best_peer"] == pytest.approx(best / case["chai_ms"])
    decode = result["cases"][0]
    read = 2 * 96 * 16 * 4 * (2 + 4)  # B · T · D · float32 · (R + G)
    assert decode["bandwidth_gb_s"] == pytest.approx(read / decode["chai_ms"] / 1e6)


@needs_library
def test_attention_measures_caches_of_fewer_bits(command):
    options = ("--phase", "decode", "--kv-heads", 4, "--kept", 2, "--key-bits", 8, "--value-bits", 4)
    outcome = command("bench", "attention", *SMALL, *options, "--json")
    assert outcome.code == 0, outcome.err
    (case,) = outcome.json["cases"]
    assert (case["key_bits"], case["value_bits"]) == (8, 4)
    assert sorted(case["peers_ms"]) == ["chai_all_heads", "chai_float32_all_heads", *PEERS]
    key, value = 16 + 2, 8 + 4  # codes and float16 scales of a row of 16 elements in groups of 16
    assert case["ceiling"] == pytest.approx(2 * 4 * 64 / (2 * key + 4 * value))
    assert case["bandwidth_gb_s"] == pytest.approx(96 * (2 * key + 4 * value) / case["chai_ms"] / 1e6)


@needs_library
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("bits", [(0, 0), (8, 4), (16, 8)])
def test_pools_of_pages_hold_the_rows_of_the_problem(phase, bits):
    problem = Problem(Shape(phase, 2, 8, 4, 4, 32, 1500))
    expected = np.array(clustered_head_attention(problem, 4, (0, 0), 1, page_length=2048)())
    got = clustered_head_attention(problem, 4, bits, 1, page_length=48)()
    assert np.abs(got - expected).max() <= {0: 1e-6, 4: 0.3, 8: 0.05}[bits[1]] * np.abs(expected).max()


@needs_library
def test_attention_prints_a_table_for_people(command):
    outcome = command("bench", "attention", *SMALL, "--phase", "decode", "--dtype", "float16")
    assert outcome.code == 0, outcome.err
    assert "8/8/2" in outcome.out
    assert "ceiling" in outcome.out
    assert "GB/s; threads: 1" in outcome.err


@needs_library
def test_attention_names_peers_whose_scores_would_not_fit(command, monkeypatch):
    import psutil

    small = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    outcome = command("bench", "attention", *SMALL, "--phase", "prefill", "--kv-heads", 2, "--json")
    assert outcome.code == 0, outcome.err
    (case,) = outcome.json["cases"]
    assert list(case["skipped"]) == ["ort_attention"]
    assert "scores" in case["skipped"]["ort_attention"]


@pytest.mark.parametrize("flags", [("--kept", 9), ("--kv-heads", 3), ("--kept", 0)])
def test_attention_refuses_heads_that_do_not_fit(command, flags):
    outcome = command("bench", "attention", "--heads", 8, *flags)
    assert outcome.code == 2
    assert flags[0] in outcome.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--length", 0),
        ("--batch", 0),
        ("--head-dim", 0),
        ("--heads", 0),
        ("--threads", 0),
        ("--threads", -3),
        ("--seconds", -1),
    ],
)
def test_attention_refuses_sizes_that_make_no_sense(command, flags):
    outcome = command("bench", "attention", "--phase", "decode", *flags)
    assert outcome.code == 2
    assert f"{flags[0]} is {flags[1]}" in outcome.err


def test_generate_refuses_no_threads(command, bundle):
    outcome = command("bench", "generate", bundle, "--threads", 0)
    assert outcome.code == 2
    assert "--threads is 0" in outcome.err


def test_idle_threads_of_torch_sleep_unless_the_user_decides_otherwise(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # as good as unset, and put back afterwards
    machine.let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    machine.let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_too_late_to_let_torchs_threads_sleep_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", object())
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    machine.let_idle_threads_sleep()
    assert "OMP_WAIT_POLICY=PASSIVE" in capsys.readouterr().err
    assert os.environ["OMP_WAIT_POLICY"] == ""


def test_sessions_stop_spinning_after_their_turn_when_asked(bundle):
    key = "session.force_spinning_stop"
    quiet, usual = (
        OnnxRuntimeSession(Bundle.load(bundle), spin_after=spin)._session.get_session_options()
        for spin in (False, True)
    )
    assert quiet.get_session_config_entry(key) == "1"
    with pytest.raises(RuntimeError, match=key):
        usual.get_session_config_entry(key)


def test_generate_times_both_modes_and_says_why_a_peer_is_missing(command, bundle):
    arguments = ("--prompt-tokens", 20, "--new-tokens", 3, "--rounds", 1, "--threads", 1)
    outcome = command("bench", "generate", bundle, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert set(result["tpot_ms"]) == set(result["ttft_ms"]) == {"chai", "chai_all_heads"}
    assert set(result["tpot_spread"]) == set(result["ttft_spread"]) == {"chai", "chai_all_heads"}
    assert list(result["skipped"]) == ["onnxruntime_genai"]
    assert 1.0 < result["ceiling"] < 1.1


def test_generate_refuses_a_prompt_of_no_tokens(command, bundle):
    outcome = command("bench", "generate", bundle, "--prompt-tokens", 0)
    assert outcome.code == 2
    assert "--prompt-tokens is 0" in outcome.err


def test_memory_counts_fewer_cache_bytes_with_chai(command, bundle):
    outcome = command("bench", "memory", bundle, "--prompt-tokens", 20, "--new-tokens", 2, "--json")
    assert outcome.code == 0, outcome.err
    chai, all_heads = (outcome.json["heads"][mode] for mode in ("chai", "all"))
    assert chai["kv_cache_bytes"] * 24 == all_heads["kv_cache_bytes"] * 20  # K of 5 + 3 heads of 12, V of all
    assert chai["peak_resident_bytes"] >= chai["peak_resident_bytes_when_loaded"] > 0


def test_interleaved_runs_take_turns():
    order = []
    timings = interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"},
        min_seconds=0,
        min_rounds=20,
        max_rounds=20,
    )
    rounds = ["".join(order[first : first + 3]) for first in range(3, len(order), 3)]
    assert len(rounds) == 20
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6  # nobody always follows the same one
    assert all(timing.lower <= timing.median <= timing.upper for timing in timings.values())


def test_one_round_without_warm_up_is_one_call_and_has_no_spread():
    calls = []
    timings = interleaved(
        {"a": lambda: calls.append("a")}, min_rounds=1, max_rounds=1, warm_up=False, progress="once"
    )
    assert calls == ["a"]
    assert timings["a"].spread == 0


def test_problem_shares_its_memory_and_has_one_large_cluster():
    problem = Problem(Shape(Phase.DECODE, 2, 8, 4, 2, 16, 32))
    inputs = problem.op_inputs(2)
    assert problem.compact_keys(2).base is not None
    assert problem.compact_keys(2).shape == (2, 2, 32, 16)
    assert inputs["key"] is problem.key
    assert head_map(8, 4, 2).tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert (problem.key_cache[:, :, 31:] == problem.key).all()
