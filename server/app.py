"""The Flower ServerApp: a federation document to a strategy, to rounds, to a run folder.

`execute` is one run on any grid. `app` is the same for Flower's own runtimes, which hand it a grid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common import federation as federations
from common.errors import ConfigError, RunFailed
from common.federation import Federation
from common.metrics import Metrics
from common.noise import NoiseSource, secure
from common.privacy import evaluation_release
from common.state import State, initial_state
from server import strategies
from server.central import CentralDP
from server.privacy import row_epsilon, statement
from server.rounds import Event, Run, run_rounds
from server.rundir import RunFolder


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
) -> dict[str, Any]:
    """Runs a federation from its first round to its end, and writes the run folder.

    Args:
        name: the run's, known to every client; a client's ledger charges it.
        observe: is given each event as it is written.
        held_out: scores every round's model on a table of the server's own (server/scoring.py).
        noise: for `privacy.client`; by default keyed by the operating system.

    Returns:
        What result.json holds. Ctrl-C ends the run as `stopped`, with the model of the last complete round.

    Raises:
        RunFailed: the run could not go on; result.json says `failed` and why.
    """
    evaluation_release(federation)  # refuses an impossible document before anyone connects
    central = CentralDP(federation, noise or secure()) if federation.privacy.client else None

    def record(event: Event) -> None:
        event = {**event, "time": time.time()}
        folder.record(event)
        observe(event)

    run = Run(
        federation=federation,
        name=name,
        state=initial_state(federation),
        observe=record,
        save=lambda state, server_round: folder.save_model(
            state, server_round=server_round, charged=asdict(central.charged) if central else None
        ),
        name_of=name_of,
        held_out=held_out,
        central=central,
    )
    if central is not None:
        run.charge = lambda: folder.write_json("privacy.json", statement(run))
    started = time.monotonic()
    record(
        {
            "event": "start",
            "run": name,
            "federation": federation.fingerprint,
            "rounds": federation.training.rounds,
        }
    )
    try:
        run_rounds(run, grid, strategies.build(federation), wait_s=wait_s)
    except KeyboardInterrupt:
        run.status, run.reason = "stopped", "interrupted"
    except RunFailed as error:
        run.reason = str(error)
        raise
    except Exception as error:
        run.reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        result = _finish(run, folder, seconds=time.monotonic() - started)
        record({"event": "end", "status": run.status, "reason": run.reason})
    return result


def _finish(run: Run, folder: RunFolder, *, seconds: float) -> dict[str, Any]:
    if run.round == 0:
        folder.save_model(run.state, server_round=0)
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
