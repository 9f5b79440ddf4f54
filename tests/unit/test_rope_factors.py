"""What a configuration says of rotary embedding, and where a text that grows past a switch is divided."""

from __future__ import annotations

from typing import Any

import pytest

from chai_export.bundle.manifest import RopeRecord
from chai_export.models.rope import Rope, rope_of
from chai_export.quality.boundaries import pieces, stretches

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 40}
CONTEXT = {"max_position_embeddings": 160}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Rope()),
        ({}, Rope()),
        ({"rope_theta": 1e4}, Rope(("default",))),
        ({"rope_parameters": LONG, **CONTEXT}, Rope(("longrope",), (40,), None, (40,))),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 32, **CONTEXT},
         Rope(("longrope",), (32,), None, (32,))),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": 32.0},
         Rope(("longrope",), (32,), None, (32,))),
        ({"rope_parameters": {"rope_type": "llama3"}, **CONTEXT}, Rope(("llama3",), (), None, (160,))),
        ({"rope_scaling": {"type": "dynamic"}, **CONTEXT}, Rope(("dynamic",), (), 160)),
        ({"rope_parameters": {"a": LONG, "b": {"rope_type": "default"}}},
         Rope(("longrope", "default"), (40,), None, (40,))),
        ({"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 1e400}, Rope(("longrope",))),
        ({"rope_scaling": "longrope"}, Rope()),
    ],
)  # fmt: skip
def test_configurations_of_any_age_and_shape_are_read(config: Any, expected: Rope) -> None:
    assert rope_of(config) == expected


def test_tokens_are_divided_by_the_length_they_were_chosen_at() -> None:
    assert list(stretches(20, 30, [24])) == [(20, 25), (25, 30)]
    assert list(stretches(25, 30, [24])) == [(25, 30)]
    assert list(stretches(20, 25, [24])) == [(20, 25)]


@pytest.mark.parametrize("total", [1, 5, 6, 7, 8, 40])
def test_pieces_feed_everything_once_and_the_probe_first(total: int) -> None:
    parts = pieces(total, 5)
    assert sum(parts) == total
    assert min(parts) >= 1
    assert parts[0] >= min(5, total)


def test_switch_lengths_ascend() -> None:
    with pytest.raises(ValueError, match="does not ascend"):
        RopeRecord(switch_lengths=[48, 24])
