"""python -m simulations.picture: the README's picture of a report, docs/report.png, from a run of the four hospitals.

Needs Chromium, which takes the picture.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from server.folder.folder import read_run
from server.report import page
from simulations import HEART

PICTURE = Path(__file__).parent.parent / "docs" / "report.png"
SIZE = "1100,760"


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("error: no chromium here; it takes the picture", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, shown = folder / "run", folder / "report.html"
        simulated = [sys.executable, "-m", "cloister", "simulate", str(HEART / "federation.yaml"), "--out", str(run)]
        where = ["--data-dir", str(HEART), "--no-report", "--quiet"]
        subprocess.run([*simulated, *where], check=True, stdout=subprocess.DEVNULL)
        shown.write_text(page.report(read_run(run)))
        subprocess.run(
            [
                chromium,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={folder / 'profile'}",
                f"--window-size={SIZE}",
                "--virtual-time-budget=15000",
                f"--screenshot={PICTURE}",
                shown.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
