"""The Flower ServerApp: a federation document to a strategy, to rounds, to a run folder.

`execute` is one run on any grid. `app` is the same for Flower's own runtimes, which hand it a grid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.document import federation as federations
from common.document.federation import Federation
from common.errors import CloisterError, ConfigError, RunFailed, RunFolderError
from common.model.memory import room_for
from common.model.scores import Scores
from common.model.weights import Weights, initial_weights
from common.privacy.noise import NoiseSource, secure
from common.privacy.releases import evaluation_release
from server.folder.checkpoint import Checkpoint
from server.folder.folder import START, RunFolder
from server.folder.journal import FolderJournal
from server.folder.start import StartModel, read_start
from server.folder.statement import row_epsilon, statement
from server.rounds import strategies
from server.rounds.client_privacy import ClientLevelDP
from server.rounds.cohort import note_refusals
from server.rounds.events import Ended, Event, Resumed, Standing, Started, after
from server.rounds.flower_grid import FlowerGrid
from server.rounds.loop import run_rounds
from server.rounds.run import Ending, Progress, Run


def execute(
    federation: Federation,
    grid: Grid,
    folder: RunFolder,
    *,
    name: str,
    observe: Callable[[Event], None] = lambda event: None,
    name_of: Callable[[int], str] = str,
    held_out: Callable[[Weights], Scores] | None = None,
    wait_s: float | None = None,
    noise: NoiseSource | None = None,
    settle: Callable[[], None] | None = None,
    checkpoint: Checkpoint | None = None,
    start: StartModel | None = None,
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
        start: the model that a new run begins from, if the document names one.

    Returns:
        What result.json holds. Ctrl-C and SIGTERM end the run as `stopped`, with the model of the last complete round.

    Raises:
        RunFailed: the run could not go on; result.json says `failed` and why.
        RunFolderError: the run folder could not be written.
    """
    evaluation_release(federation)  # refuses an impossible document before anyone connects
    assert checkpoint is not None or (start is None) == (federation.start is None), "read_start gives the start"
    client_privacy = ClientLevelDP(federation, noise or secure()) if federation.privacy.client else None
    strategy, standing = strategies.build(federation), Standing()

    def record(event: Event) -> None:
        nonlocal standing
        event = replace(event, time=time.time())
        folder.record(event)
        standing = after(standing, event)
        observe(event)

    if start is not None:
        folder.write_json(START, start.about)
    journal = FolderJournal(folder, settle=settle, checkpoint=checkpoint)
    run = Run(
        federation=federation,
        name=name,
        progress=_first(federation, client_privacy, start) if checkpoint is None else checkpoint.progress,
        start=folder.start(),
        observe=record,
        journal=journal,
        name_of=name_of,
        held_out=held_out,
        client_privacy=client_privacy,
    )
    progress, rounds = run.progress, federation.training.rounds
    if checkpoint is None:
        record(Started(run=name, federation=federation.fingerprint, rounds=rounds))
    else:
        standing = replace(folder.standing(), evaluation=progress.evaluation, held_out=progress.held_out_score)
        _catch_up(run, standing, record)
        record(Resumed(round=progress.round, run=name, federation=federation.fingerprint, rounds=rounds))

    def end(ending: Ending) -> dict[str, Any]:
        note_refusals(run, grid)  # those since the last round began
        _catch_up(run, standing, record)
        journal.save_model(run, durably=True)
        result = _result(run, ending, standing, seconds=journal.seconds)
        folder.write_json("privacy.json", statement(run))
        folder.write_json("result.json", result)
        record(Ended(status=ending.status, reason=ending.reason))
        return result

    try:
        journal.save(run)
        with room_for(federation):
            ending = run_rounds(run, grid, strategy, wait_s=wait_s)
    except KeyboardInterrupt as interrupt:
        ending = Ending("stopped", str(interrupt) or "interrupted")
        journal.undo_what_is_not_saved(run)
    except Exception as error:
        reason = str(error) if isinstance(error, CloisterError) else f"{type(error).__name__}: {error}"
        journal.undo_what_is_not_saved(run)
        with suppress(RunFolderError):  # what ended the run is what is told
            end(Ending("failed", reason))
        if isinstance(error, RunFailed):
            error.folder = folder.path
        raise
    return end(ending)


def _first(federation: Federation, client_privacy: ClientLevelDP | None, start: StartModel | None) -> Progress:
    """Where a new run begins."""
    with room_for(federation):
        weights = initial_weights(federation) if start is None else dict(start.weights)
        return Progress(weights=weights, spent=client_privacy.spent if client_privacy else None)


def _catch_up(run: Run, standing: Standing, record: Callable[[Event], None]) -> None:
    """Tells of the last round if the process ended between its checkpoint and its event."""
    event = run.progress.event
    if event is not None and not run.progress.pending and standing.round < run.progress.round:
        record(event)


def _result(run: Run, ending: Ending, standing: Standing, *, seconds: float) -> dict[str, Any]:
    """What result.json holds."""
    row = run.federation.privacy.row
    private = None
    if row is not None:
        private = {"epsilon": row_epsilon(run), "delta": row.delta, "per_client": run.epsilon_per_client}
    client = None
    if run.client_privacy is not None:
        client = {"epsilon": run.client_privacy.planned_epsilon, "delta": run.client_privacy.settings.delta}
    return {
        "status": ending.status,
        "reason": ending.reason,
        "rounds": run.progress.round,  # that of the model; whoever stops a run may do so before its event is told
        "clients": sorted(run.progress.clients),
        "refused": dict(standing.refused),
        "seconds": seconds,
        "evaluation": standing.evaluation,
        "held_out": standing.held_out,
        "privacy": {"row": private, "client": client},
        **_energy(standing),
    }


def _energy(standing: Standing) -> dict[str, Any]:
    """What clients' tasks took, and for each percentage point of accuracy; nothing where they do not tell."""
    if (energy := standing.energy) is None:
        return {}
    per_point = energy.per_point(standing.held_out or standing.evaluation)
    return {"energy": {**energy.told, "per_point": per_point and per_point.told}}


app = ServerApp()
NODES = "nodes.json"  # in the run folder: the numbers of Flower's nodes, by the names that are shown


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Under Flower's own runtimes: the run's configuration (or CLOISTER_FEDERATION) names the document."""
    path = context.run_config.get("federation") or os.environ.get("CLOISTER_FEDERATION")
    if not path:
        raise ConfigError(["federation: not in the run's configuration, nor in CLOISTER_FEDERATION"])
    federation = federations.load(Path(str(path)))
    given = context.run_config.get("start-from") or os.environ.get("CLOISTER_START_FROM")
    start = read_start(Path(str(given)) if given else None, federation)
    strategies.build(federation)  # refuses one that is not installed before anything is written
    root = Path(str(context.run_config.get("runs") or os.environ.get("CLOISTER_RUNS") or "runs"))
    folder = RunFolder.create(federation, root=root)
    # Whoever has refused stays away, so a run that has lost its quorum should not wait for it for ever.
    wait_s = federation.strategy.round_timeout * federation.strategy.max_failed_rounds
    named = FlowerGrid(grid, names=federation.privacy.client is None)
    written: dict[str, str] = {}

    def write_nodes(event: Event) -> None:
        if named.nodes != written:
            written.update(named.nodes)
            folder.write_json(NODES, written)

    run = f"{context.run_id}"
    execute(federation, named, folder, name=run, observe=write_nodes, name_of=named.name_of, wait_s=wait_s, start=start)
