"""Headless Chromium that is told what to do, by the DevTools protocol over a pipe: JSON, ended by a null byte."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser import PATIENCE_S, QUIET, executable

# The browser reads from file 3 and writes to file 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Tab:
    """One page, as the protocol's `Page`, `Runtime` and `Emulation` see it."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._from, self._rest = to, os.fdopen(answers, "rb"), b""
        self._calls = 0
        self._session: str | None = None
        self.said: list[str] = []  # what the page, or the browser about it, wrote to its console
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Asks the browser, and returns what it answers."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._heard()
            if heard.get("id") == self._calls:
                assert "error" not in heard, heard
                return dict(heard["result"])
            if heard.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(heard["params"]))

    def _heard(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._from.fileno(), 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        first, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(first))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression, as JSON."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, expression: str, wanted: Callable[[Any], Any] = bool) -> Any:
        """Waits until an expression has a value that is wanted, and returns it."""
        deadline = time.monotonic() + PATIENCE_S
        while not wanted(found := self.value(expression)):
            text = "" if time.monotonic() < deadline else self.value("document.body.innerText")
            assert time.monotonic() < deadline, f"{expression} is {found!r} after {PATIENCE_S} s:\n{text}\n{self.said}"
            time.sleep(0.05)
        return found

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Shows the page in a window of this size, to who prefers light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """The whole page, as PNG."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(told["data"])

    def close(self) -> None:
        os.close(self._to)
        self._from.close()


@contextmanager
def tab(profile: Path, *arguments: str) -> Iterator[Tab]:
    """A browser with one page. `profile` takes its files."""
    theirs, to = os.pipe()
    answers, from_them = os.pipe()
    flags = [flag for flag in QUIET if "virtual-time" not in flag]  # here time is real
    command = [executable(), *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", *arguments]
    browser = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(theirs), str(from_them), *command],
        pass_fds=(theirs, from_them),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(from_them)
    try:
        page = Tab(to, answers)
        try:
            yield page
        finally:
            page.close()  # which ends the browser
    finally:
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
