"""Headless Chromium for tests that open a page: what it has drawn, and what it asked the network for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PATIENCE_S = 90
# Chromium runs errands of its own, which no page asks for. Most can be switched off; the rest go to its maker.
ITS_OWN = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gstatic)\.com[/:]")
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--disable-features=OptimizationHints,MediaRouter,Translate,AutofillServerCommunication,CertificateTransparencyComponentUpdater",
    "--virtual-time-budget=15000",
)


def executable() -> str:
    """Chromium, if it is installed. Without it a test is skipped, except where CLOISTER_TEST_BROWSER says that it must
    be there."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CLOISTER_TEST_BROWSER"):
            pytest.fail("CLOISTER_TEST_BROWSER is set, and no chromium is installed")
        pytest.skip("no chromium is installed")
    return found


@dataclass(frozen=True)
class Opened:
    """A page as the browser has it in the end, and the addresses on a network that it asked for."""

    dom: str
    asked: list[str]


def opened(page: Path, folder: Path, *arguments: str) -> Opened:
    """Opens a page. `folder` takes the browser's files."""
    log = folder / "net.json"
    command = [executable(), *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", *arguments]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    # One event a line; the file as a whole is JSON only if the browser had time to end it.
    asked = set(re.findall(r'"url":"([^"]*)"', log.read_text()))
    return Opened(done.stdout, sorted(url for url in asked if not ITS_OWN.match(url)))


def printed(page: Path, out: Path, folder: Path) -> bytes:
    """The page as it is printed, as PDF."""
    command = [executable(), *QUIET, f"--user-data-dir={folder / 'profile'}", "--no-pdf-header-footer"]
    done = subprocess.run(
        [*command, f"--print-to-pdf={out}", page.as_uri()], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out.read_bytes()
