"""Commands in an empty home leave no file there but those that docs/privacy.md names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY

NAMED = (".cache/chai_export/hashes.json", ".cache/matplotlib/")
UNSET = {
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "MPLCONFIGDIR",
    "HF_HOME", "ORT_DISABLE_TELEMETRY",
}  # fmt: skip


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user whose home is ``home`` and who has set nothing."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return {**kept, "HOME": str(home), **more}


def test_no_file_appears_that_is_not_named(tmp_path, tiny_model, text):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    clusters, bundle = work / "clusters.json", work / "bundle"
    commands = (
        ("calibrate", tiny_model, "--text", text, "-o", clusters, "--plot", work / "curves.png",
         "--samples", 1, "--seq-len", 16, "--keep", "elbow"),
        ("calibrate", tiny_model, "--text", text, "-o", work / "plan.json", "--samples", 1, "--seq-len", 24,
         "--force"),
        ("export", tiny_model, "--clusters", clusters, "-o", bundle),
        ("run", bundle, "--token-ids", "1,2", "--max-new-tokens", 2),
        ("verify", bundle, "--reference", tiny_model),
        ("inspect", bundle),
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "chai_export", *map(str, command)],
            capture_output=True, check=False, cwd=work, env=environment(home),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    assert [name for name in found if not name.startswith(NAMED)] == []
    page = (REPOSITORY / "docs" / "privacy.md").read_text(encoding="utf-8")
    for name in NAMED:
        assert name.removeprefix(".cache/") in page
        assert any(file.startswith(name) for file in found), f"{name} is named and not written"


@pytest.mark.parametrize("own", [None, "0"])
def test_telemetry_is_off_before_onnxruntime_is_imported_unless_the_user_says_so(own, tmp_path):
    program = "import chai_export.runtime.onnxruntime_session, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    values = {} if own is None else {"ORT_DISABLE_TELEMETRY": own}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, check=True, text=True, env=environment(tmp_path, **values),
    )  # fmt: skip
    assert done.stdout.strip() == (own or "1")
