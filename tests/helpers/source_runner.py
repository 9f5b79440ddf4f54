"""Runs a source graph through ONNX Runtime: a prompt in one piece, then one token after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from chai_export.bundle.bundle import Bundle
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.runner import load
from tests.helpers.onnx_fixtures import Fixture

TYPES = {element.onnxruntime: element.numpy for element in ELEMENT_TYPES.values()}


class SourceRunner:
    def __init__(self, path: Path, *, optimised: bool = False) -> None:
        options = ort.SessionOptions()
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = self.session.get_inputs()
        self.outputs = [value.name for value in self.session.get_outputs()]

    def logits(self, prompt: list[int], steps: list[int], kv_heads: int) -> np.ndarray:
        caches = {}
        for value in self.inputs:
            if "past" in value.name:
                rows = value.shape[2] if isinstance(value.shape[2], int) else 0
                caches[value.name] = np.zeros((1, kv_heads, rows, 16), TYPES[value.type])
        past, collected = 0, []
        for tokens in [prompt, *([token] for token in steps)]:
            total = past + len(tokens)
            given = {
                "input_ids": np.array([tokens]),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(past, total)[None],
                "cache_position": np.arange(past, total),
                "write_indices": np.array([past]),
                "nonpad_kv_seqlen": np.array([total]),
            }
            wanted = [value.name for value in self.inputs]
            results = self.session.run(None, {k: v for k, v in {**given, **caches}.items() if k in wanted})
            named = dict(zip(self.outputs, results, strict=True))
            collected.append(named["logits"][0].astype(np.float32))
            caches = {name: named[name.replace("past_key_values", "present")] for name in caches}
            past = total
        return np.concatenate(collected)

    def differs_from(self, bundle: Bundle, fixture: Fixture) -> float:
        prompt = fixture.reference["input_ids"].tolist()
        steps = fixture.reference["greedy"][:6].tolist()
        expected = self.logits(prompt, steps, fixture.kv_heads)
        logits = load(bundle.path, heads="all").logits([*prompt, *steps])
        return float(np.abs(logits - expected).max())
