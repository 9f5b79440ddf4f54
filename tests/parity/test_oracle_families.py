"""Every supported family from its model to a verified bundle: the gate as users run it."""

from __future__ import annotations

import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.exporter.stage import export
from chai_export.quality.verify import verify
from tests.helpers.exported import kept_of, layers
from tests.helpers.families import GATES_IN_CI, each_family, family_model


@pytest.mark.parametrize("name", each_family(GATES_IN_CI))
def test_a_bundle_of_every_family_passes_the_gate(name, tmp_path):
    family_model(name, **layers(name)).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", Clusters(kept_of(name)), tmp_path / "bundle")
    result = verify(tmp_path / "bundle", tmp_path / "model")
    assert result.ok
    assert max(result.max_abs_logit_diff.values()) <= 1e-4
    assert result.greedy_match == {"all": True, "chai": True}
    assert result.head_map_agreement == 1.0
    assert result.greedy_ties == 0
    # Beside the four prompts and what follows them: texts up to each window, past it, and across it.
    windows = {window for window in Bundle.load(tmp_path / "bundle").manifest.windows or () if window}
    around = sum(window + (window + 2) + (window - 1 + 3) + (window // 2 + 3) for window in windows)
    assert (result.prompts, result.tokens) == (4 + len(windows), 4 * 64 + 3 + 6 + 17 + 29 + around)
