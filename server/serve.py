"""The server process: one run, served over gRPC to its end."""

from __future__ import annotations

import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.certificates.identity import ServerIdentity
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import CertificateError, CloisterError, ConfigError, RunFailed, RunFolderError
from common.privacy.releases import evaluation_release
from common.wire.address import parse_option
from server.app import execute
from server.folder import checkpoint as checkpoints
from server.folder.checkpoint import Checkpoint
from server.folder.folder import RunFolder, model_for_clients
from server.folder.start import StartModel, read_start
from server.observers.status import Watch
from server.observers.summary import Summary
from server.rounds import strategies
from server.rounds.events import TERMINATED, Event, Serving, all_of
from server.sessions.gate import Limits
from server.sessions.grid import GrpcGrid

if TYPE_CHECKING:
    from server.dashboard.serving import Dashboard
    from server.observers.scoring import HeldOut
    from server.observers.trackers.tracking import Kind

log = logging.getLogger("cloister.server")


@dataclass(frozen=True)
class Begun:
    """A run that is about to start, or to go on."""

    federation: Federation
    name: str
    folder: Callable[[], RunFolder]  # asked for once the port is ours
    checkpoint: Checkpoint | None = None
    is_over: bool = False  # is all that is left to give its model to clients?
    start: StartModel | None = None  # what a new run begins from, if its document names a model

    def prepare(self, folder: RunFolder) -> None:
        """Mends and updates the folder of a run that goes on."""
        if self.checkpoint is None:
            return
        if checkpoints.load(folder.path).number != self.checkpoint.number:
            raise RunFolderError(f"{folder.path}: another server went on with this run meanwhile; try again")
        folder.mend()
        folder.write_document(self.federation)


def new_run(document: Path, *, out: Path | None, start_from: Path | None = None) -> Begun:
    """A run of a document's federation. Raises `ConfigError`, and as `read_start` does."""
    federation = federations.load(document)
    strategies.build(federation)  # refuses one that is not installed before anything is written
    start = read_start(start_from, federation)
    name = f"{federation.name}-{secrets.token_hex(8)}"
    return Begun(federation, name, lambda: RunFolder.create(federation, path=out), start=start)


def resumed_run(path: Path, *, rounds: int | None, stay: bool = False) -> Begun:
    """The run of a run folder, after its last complete round.

    Args:
        rounds: how many it is to have in all, if more than its document says; without privacy only.
        stay: take one, too, that has nothing left to do but to give its model to clients.

    Raises:
        RunFolderError: it cannot be resumed, or has nothing left to do.
        ConfigError: more rounds would cost more privacy than its document says.
    """
    folder = RunFolder.open(path)
    federation = federations.load(path / "federation.yaml")
    strategies.build(federation)
    checkpoint = checkpoints.load(path, may_fall_back=federation.privacy.client is None)
    if federation.with_rounds(checkpoint.rounds).fingerprint != checkpoint.fingerprint:
        raise RunFolderError(f"{path}: its federation.yaml is not the one that its checkpoint was made with")
    if rounds is not None:
        federation = _extended(federation, rounds, done=checkpoint.round)
    is_over = checkpoint.round >= federation.training.rounds and folder.is_complete()
    if is_over and not stay:
        raise RunFolderError(
            f"{path}: has completed its {checkpoint.round} rounds; --rounds N goes on to N of them, and --stay lets "
            "clients fetch its model"
        )
    return Begun(federation, checkpoint.run, lambda: folder, checkpoint, is_over)


def _extended(federation: Federation, rounds: int, *, done: int) -> Federation:
    if federation.privacy.limits:
        raise ConfigError(
            [
                f"--rounds: the noise was chosen so that {federation.training.rounds} rounds cost the epsilon that the "
                "document states, and more would cost more; begin another federation, whose document says so"
            ]
        )
    if rounds <= done:
        raise ConfigError([f"--rounds: must be more than the {done} rounds that the run has (got {rounds})"])
    return federation.with_rounds(rounds)


def serve(
    begun: Begun,
    *,
    address: str,
    certificates: Path | None,
    insecure: bool,
    held_out: Path | None,
    explain_every: int | None,
    wait_s: float | None,
    limits: Limits,
    metrics_port: int | None,
    dashboard: str | None = None,
    dashboard_token: Path | None = None,
    stay: bool,
    observers: Sequence[Callable[[Event], None]],
    track: Sequence[Kind] = (),
    ended: Callable[[dict[str, Any], Path], None] = lambda result, folder: None,
) -> tuple[dict[str, Any], Path]:
    """Serves one run to its end, and gives its model to clients. Returns what result.json holds, and the run folder.

    Args:
        stay: afterwards wait for clients that fetch the model, until Ctrl-C.
        held_out: a table to score every round's model on.
        explain_every: after so many rounds it is also written down what the model relies on there (summary.md).
        wait_s: seconds to wait for the quorum; None waits for ever.
        metrics_port: where Prometheus may ask; None is nowhere.
        dashboard: HOST:PORT of a page that follows the run; None is nowhere.
        dashboard_token: file with the secret that whoever opens that page must know.
        observers: are given each event.
        track: also in which trackers the run is to be seen (server/observers/trackers).
        ended: is told what is returned, once clients know that the run is over.

    Raises:
        CloisterError: what `execute` raises, and mistakes in what is given here, before the run folder is made.
    """
    federation = begun.federation
    evaluation_release(federation)
    host = parse_option("--address", address, lowest=0).host
    identity = _identity(certificates, insecure)
    scorer = _scorer(federation, held_out, explain_every)
    _terminate_on_sigterm()
    for line in scorer.report.lines(of="held-out table") if scorer else ():
        log.log(logging.WARNING if line.startswith("warning: ") else logging.INFO, "%s", line)
    watch = Watch(federation, begun.name)
    grid = GrpcGrid(federation, run=begun.name, address=address, identity=identity, limits=limits, status=watch.status)
    watch.clients = grid.sessions.describe
    metrics = _metrics(metrics_port, grid) if metrics_port is not None else None
    page = None
    reason, comes_back = "the run failed", False
    try:
        if dashboard is not None:
            page = _dashboard(dashboard, dashboard_token, begun, grid, identity, certificates)
        grid.start()
        folder = begun.folder()
        served = f"{host}:{grid.port}"
        with folder.lock():
            grid.sessions.model = lambda: model_for_clients(folder.path)
            log.info("serving %s on %s, fingerprint %s", federation.name, served, federation.fingerprint)
            for warning in identity.warnings() if identity else ():
                log.warning(warning)
            if page is not None:
                page.start(before=folder.events())
            if begun.is_over:
                result, comes_back = folder.result(), False
                _give_model(grid, folder, "completed")
                ended(result, folder.path)
                _wait_for_fetches()
                return result, folder.path
            begun.prepare(folder)
            folder.record(Serving(address=served, time=time.time()))
            trackers = _trackers(track, federation, folder) if track else []
            result = execute(
                federation,
                grid,
                folder,
                name=begun.name,
                observe=all_of(
                    *observers, watch, *filter(None, [metrics, page]), *trackers, Summary(federation, folder.path)
                ),
                name_of=grid.name_of,
                held_out=scorer,
                wait_s=wait_s,
                settle=grid.settle,
                checkpoint=begun.checkpoint,
                start=begun.start,
            )
            if result["reason"] == TERMINATED:
                reason, comes_back = "it was terminated", True
            else:
                reason = result["status"].replace("_", " ")
                _give_model(grid, folder, reason)
            ended(result, folder.path)
            if stay and result["status"] != "stopped":
                _wait_for_fetches()
    except RunFailed:
        _give_model(grid, folder, reason)  # of the rounds before it failed
        raise
    except BaseException:
        reason, comes_back = "it met an error", True  # which whoever runs it can mend, and then resume
        raise
    finally:
        if page is not None:
            page.stop()
        grid.stop(reason, comes_back=comes_back)
    return result, folder.path


def _wait_for_fetches() -> None:
    """Until Ctrl-C or SIGTERM clients that come are given the model."""
    log.info("the run is over; clients can fetch its model until Ctrl-C")
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


def _give_model(grid: GrpcGrid, folder: RunFolder, reason: str) -> None:
    """Gives the model to all clients that are there."""
    model = None
    try:
        model = model_for_clients(folder.path)
    except CloisterError as error:
        log.info("clients are given no model: %s", error)
    with suppress(KeyboardInterrupt):
        grid.finish(reason, model)


def log_event(event: Event) -> None:
    """An observer for a log in JSON."""
    told = event.to_json()
    log.info(told["event"], extra={"event": told})


def _trackers(track: Sequence[Kind], federation: Federation, folder: RunFolder) -> list[Callable[[Event], None]]:
    from server.observers.trackers.tracking import live  # only for who wants them

    return live(track, federation, folder.path, past=folder.events(), warn=log.warning)


def _metrics(port: int, grid: GrpcGrid) -> Callable[[Event], None]:
    from server.observers.prometheus import Prometheus  # only for who wants them

    metrics = Prometheus(connected=lambda: len(grid.get_node_ids()))
    log.info("metrics on http://127.0.0.1:%d/metrics", metrics.serve(port))
    return metrics


def _dashboard(
    address: str,
    token: Path | None,
    begun: Begun,
    grid: GrpcGrid,
    identity: ServerIdentity | None,
    certificates: Path | None,
) -> Dashboard:
    from server.dashboard.access import access  # only for who wants it
    from server.dashboard.serving import Dashboard

    allowed = access(address, token_file=token, identity=identity, certificates=certificates)
    page = Dashboard(begun.federation, begun.name, allowed, clients=grid.describe)
    log.info("dashboard on %s%s", page.url, "?token=..., with the token of its file" if allowed.token else "")
    return page


def _identity(certificates: Path | None, insecure: bool) -> ServerIdentity | None:
    if certificates is not None:
        return ServerIdentity(certificates)
    if not insecure:
        raise CertificateError(
            "give --certificates FOLDER (made by `cloister certs`), or --insecure for plain text on loopback"
        )
    return None


def _scorer(federation: Federation, held_out: Path | None, explain_every: int | None) -> HeldOut | None:
    if held_out is None:
        if explain_every is not None:
            raise ConfigError(["--explain-every needs rows that the server may look at: give --held-out TABLE"])
        return None
    from server.observers.scoring import HeldOut  # torch, which only such a server needs

    return HeldOut(federation, held_out, explain_every=explain_every)


def _terminate_on_sigterm() -> None:
    def terminate(*_: object) -> None:
        raise KeyboardInterrupt(TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
