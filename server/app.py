"""The Flower ServerApp: a federation document to a strategy, to rounds, to a run folder.

`execute` is one run on any grid. `app` is the same for Flower's own runtimes, which hand it a grid.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from common.document import federation as federations
from common.document.federation import Federation
from common.errors import CloisterError, ConfigError, RunFolderError
from common.model.memory import room_for
from common.model.scores import Metrics
from common.model.weights import State, initial_state
from common.privacy.noise import NoiseSource, secure
from common.privacy.releases import evaluation_release
from server.folder import checkpoint as checkpoints
from server.folder.checkpoint import Checkpoint
from server.folder.folder import RunFolder
from server.folder.statement import row_epsilon, statement
from server.rounds import strategies
from server.rounds.client_privacy import CentralDP
from server.rounds.loop import run_rounds
from server.rounds.run import Event, Run


def execute(
    federation: Federation,
    grid: Grid,
    folder: RunFolder,
    *,
    name: str,
    observe: Callable[[Event], None] = lambda event: None,
    name_of: Callable[[int], str] = str,
    held_out: Callable[[State], Metrics] | None = None,
    wait_s: float | None = None,
    noise: NoiseSource | None = None,
    settle: Callable[[], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Runs a federation from its first round, or from a checkpoint, to its end, and writes the run folder.

    Args:
        name: the run's, known to every client; a client's ledger charges it.
        observe: is given each event as it is written.
        held_out: scores every round's model on a table of the server's own (server/observers/scoring.py).
        noise: for `privacy.client`; by default keyed by the operating system.
        settle: is called when a round is on disk. With it every round leaves a checkpoint; without it none does, and
            nothing can be resumed.
        checkpoint: of this run, to go on from.

    Returns:
        What result.json holds. Ctrl-C and SIGTERM end the run as `stopped`, with the model of the last complete round.

    Raises:
        RunFailed: the run could not go on; result.json says `failed` and why.
        RunFolderError: the run folder could not be written.
    """
    evaluation_release(federation)  # refuses an impossible document before anyone connects
    central = CentralDP(federation, noise or secure()) if federation.privacy.client else None
    strategy = strategies.build(federation)

    def record(event: Event) -> None:
        event = {**event, "time": time.time()}
        folder.record(event)
        observe(event)

    run = Run(
        federation=federation,
        name=name,
        state=_first_model(federation),
        observe=record,
        name_of=name_of,
        held_out=held_out,
        central=central,
    )
    if central is not None:
        run.charge = lambda: folder.write_json("privacy.json", statement(run))
    started = time.monotonic()
    about: Event = {"run": name, "federation": federation.fingerprint, "rounds": federation.training.rounds}
    if checkpoint is None:
        record({"event": "start", **about})
    else:
        checkpoint.restore(run, strategy)
        started -= checkpoint.seconds
        if run.event is not None and not run.pending and folder.last_round() < run.round:
            record(run.event)  # it ended between the checkpoint and the event
        record({"event": "resumed", "round": run.round, **about})
    run.settle, run.save = settle or run.settle, _saving(run, strategy, folder, started, checkpoint, settle is not None)
    try:
        run.save()
        with room_for(federation):
            run_rounds(run, grid, strategy, wait_s=wait_s)
    except KeyboardInterrupt as interrupt:
        run.status, run.reason = "stopped", str(interrupt) or "interrupted"
        _undo_what_is_not_saved(run, strategy, folder, resumable=settle is not None)
    except Exception as error:
        run.reason = str(error) if isinstance(error, CloisterError) else f"{type(error).__name__}: {error}"
        _undo_what_is_not_saved(run, strategy, folder, resumable=settle is not None)
        with suppress(RunFolderError):  # what ended the run is what is told
            _end(run, folder, record, started)
        raise
    return _end(run, folder, record, started)


def _first_model(federation: Federation) -> State:
    with room_for(federation):
        return initial_state(federation)


def _undo_what_is_not_saved(run: Run, strategy: Strategy, folder: RunFolder, *, resumable: bool) -> None:
    """A round that was cut off will be made again, with other noise: nothing of it may be told, or it would have been
    released twice and charged once."""
    if resumable:
        with suppress(RunFolderError):
            checkpoints.load(folder.path).restore(run, strategy)


def _saving(
    run: Run, strategy: Strategy, folder: RunFolder, started: float, checkpoint: Checkpoint | None, resumable: bool
) -> Callable[[], None]:
    """What `run.save` does: a checkpoint, and then the model for those who read it."""
    numbers = itertools.count(checkpoint.number + 1 if checkpoint else 0)

    def save() -> None:
        if resumable:
            checkpoints.save(folder.path, run, strategy, number=next(numbers), seconds=time.monotonic() - started)
        if run.central is not None:
            run.central.told_clip = run.central.clip
        _save_model(run, folder)

    return save


def _save_model(run: Run, folder: RunFolder, *, durably: bool = False) -> None:
    charged = asdict(run.central.charged) if run.central else None
    folder.save_model(run.state, server_round=run.round, charged=charged, durably=durably)


def _end(run: Run, folder: RunFolder, record: Callable[[Event], None], started: float) -> dict[str, Any]:
    _save_model(run, folder, durably=True)
    result = _finish(run, folder, seconds=time.monotonic() - started)
    record({"event": "end", "status": run.status, "reason": run.reason})
    return result


def _finish(run: Run, folder: RunFolder, *, seconds: float) -> dict[str, Any]:
    row = run.federation.privacy.row
    private = None
    if row is not None:
        private = {"epsilon": row_epsilon(run), "delta": row.delta, "per_client": run.epsilon_per_client}
    client = None
    if run.central is not None:
        client = {"epsilon": run.central.planned_epsilon, "delta": run.central.settings.delta}
    result = {
        "status": run.status,
        "reason": run.reason,
        "rounds": run.round,
        "clients": sorted(run.clients),
        "seconds": seconds,
        "evaluation": run.evaluation,
        "held_out": run.held_out_score,
        "privacy": {"row": private, "client": client},
    }
    folder.write_json("privacy.json", statement(run))
    folder.write_json("result.json", result)
    return result


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Under Flower's own runtimes: the run's configuration (or CLOISTER_FEDERATION) names the document."""
    path = context.run_config.get("federation") or os.environ.get("CLOISTER_FEDERATION")
    if not path:
        raise ConfigError(["federation: not in the run's configuration, nor in CLOISTER_FEDERATION"])
    federation = federations.load(Path(str(path)))
    root = Path(str(context.run_config.get("runs") or os.environ.get("CLOISTER_RUNS") or "runs"))
    folder = RunFolder.create(federation, root=root)
    # Whoever has refused stays away, so a run that has lost its quorum should not wait for it for ever.
    wait_s = federation.strategy.round_timeout * federation.strategy.max_failed_rounds
    execute(federation, grid, folder, name=f"{context.run_id}", wait_s=wait_s)
