"""The picture of the report in the README: the demo bundle's page, drawn by headless Chromium.

    make demo && python benchmarks/report_screenshot.py    # writes docs/images/report.png

Needs Chromium (apt-get install chromium). Other methods stand on the plan's chart where
`python benchmarks/scoreboard.py demo` has left its result.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from chai_export.report.stage import report

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "engines" / "out" / "demo"
SCOREBOARD = ROOT / "benchmarks" / "results" / "scoreboard-demo-512.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder with bundle, eval.json, verify.json")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "report.png")
    parser.add_argument("--size", default="1000,1560", help="width,height in pixels (default %(default)s)")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no Chromium found: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        given = {"evaluation": "eval.json", "verification": "verify.json"}
        files = {name: arguments.demo / file for name, file in given.items()}
        report(
            arguments.demo / "bundle", page, reference=ROOT / "examples" / "pydoc-5m",
            comparison=SCOREBOARD if SCOREBOARD.is_file() else None,
            **{name: file for name, file in files.items() if file.is_file()},
        )  # fmt: skip
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={folder}/profile", f"--window-size={arguments.size}",
            f"--screenshot={arguments.output}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
