"""`cloister serve`: the server process."""

from __future__ import annotations

import logging
import secrets
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from common import federation as federations
from common.errors import CertificateError
from common.logs import log_to, quiet_flower
from common.privacy import evaluation_release
from common.wire import tls
from common.wire.tls import TLSMaterial
from server.app import execute
from server.grid import GrpcGrid
from server.progress import ProgressDisplay
from server.rundir import RunFolder


def serve(
    document: Path,
    *,
    address: str,
    certificates: Path | None,
    insecure: bool,
    out: Path | None,
    held_out: Path | None,
    wait_s: float | None,
    console: Console,
) -> tuple[dict[str, Any], Path]:
    """Serves one run to its end. Returns what result.json holds, and the run folder."""
    federation = federations.load(document)
    evaluation_release(federation)
    material = _tls(certificates, insecure)
    scorer = None
    if held_out:
        from server.scoring import held_out_scorer  # torch, which only this server needs

        scorer = held_out_scorer(federation, held_out)
    _interrupt_on_sigterm()
    log_to(_ConsoleHandler(console))
    quiet_flower()
    run = f"{federation.name}-{secrets.token_hex(8)}"
    grid = GrpcGrid(federation, run=run, address=address, tls=material)
    grid.start()
    try:
        folder = RunFolder.create(federation, path=out)
        served = f"{address.rpartition(':')[0]}:{grid.port}"
        folder.record({"event": "serving", "address": served, "time": time.time()})
        console.print(
            f"serving {federation.name} on {served}, fingerprint {federation.fingerprint}",
            highlight=False,
            soft_wrap=True,
        )
        with ProgressDisplay(console, limits=federation.privacy.limits) as display:
            result = execute(
                federation,
                grid,
                folder,
                name=run,
                observe=display,
                name_of=grid.name_of,
                held_out=scorer,
                wait_s=wait_s,
            )
        reason = result["status"].replace("_", " ")
    except BaseException:
        reason = "the run failed"
        raise
    finally:
        grid.stop(reason)
    return result, folder.path


def _tls(certificates: Path | None, insecure: bool) -> TLSMaterial | None:
    if certificates is not None:
        return tls.load(certificates / "ca.pem", certificates / "server.pem", certificates / "server.key")
    if not insecure:
        raise CertificateError(
            "give --certificates FOLDER (made by `cloister certs`), or --insecure for plain text on loopback"
        )
    return None


def _interrupt_on_sigterm() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


class _ConsoleHandler(logging.Handler):
    """Log lines above the live line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), style="dim", markup=False, highlight=False, soft_wrap=True)
