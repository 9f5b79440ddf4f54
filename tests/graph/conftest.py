from __future__ import annotations

from functools import cache

import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.graph.stage import rewrite
from tests.helpers.onnx_fixtures import Fixture


@pytest.fixture(scope="session")
def rewritten(tmp_path_factory):
    """Rewrites a fixture once per session and number of kept heads."""

    @cache
    def make(fixture: Fixture, kept: int) -> Bundle:
        directory = tmp_path_factory.mktemp("rewritten") / f"{fixture.name}-{kept}"
        return rewrite(fixture.path, Clusters(kept_heads=[kept] * fixture.layers), directory)

    return make
