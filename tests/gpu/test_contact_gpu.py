"""Both GPU back ends from build to text, as `make gpu` runs them; what a machine lacks is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.engine_contact import NEW_TOKENS, contact, prompts_for, require
from chai_export.bundle.choices import Backend
from chai_export.errors import ChaiError
from tests.helpers.tiny_graph import TinyModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("bits", [(0, 0), (8, 4)])
@pytest.mark.parametrize("backend", list(Backend))
def test_a_bundle_is_built_and_generates_what_the_cpu_does(
    backend: Backend, bits: tuple[int, int], tmp_path: Path
) -> None:
    try:
        require(backend)
    except ChaiError as error:
        pytest.skip(str(error))
    model = TinyModel(positions=600, head_dim=16, value_dim=16, bits=bits, scale_group=16)
    bundle = model.write(tmp_path / "bundle")
    found = contact(bundle.path, backend, prompts_for(model.vocab), NEW_TOKENS)
    assert found["chai heads"]["most_pages"] >= 3
