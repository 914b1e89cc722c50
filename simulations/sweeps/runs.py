"""A sweep's runs: each in one process, as many at once as there are cores, and none a second time.

A sweep's folder has a run folder for each point and seed, with the model's scores beside it once the run is complete.
Whoever starts the sweep again, also with more seeds or more values, has only what is missing run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing as mp
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from client.app import table_files
from client.device import resolve_device
from common import files
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import CloisterError, RunFolderError, WorkerLost
from common.logs import quiet_flower
from server.folder.folder import RunFolder, load_model
from server.folder.start import read_start
from server.observers.scoring import HeldOut
from simulations.engine import devices_for, simulate
from simulations.interrupts import without_interrupts
from simulations.sources import Source
from simulations.sweeps.outcomes import Outcome, Result
from simulations.sweeps.points import Point
from simulations.vector.score import scores_on_validation_rows

Done = Callable[[Point, int, Outcome, bool], None]
HEAR_S = 0.5
SCORES, ABOUT = "scores.json", "sweep.json"


@dataclass(frozen=True, kw_only=True)
class How:
    """What all runs of a sweep have in common."""

    source: Source
    held_out: Path | None = None  # a table to score models on; by default the clients' validation rows
    device: str = "auto"
    processes: int = 1
    start_from: Path | None = None  # the model that documents begin from, if they do

    def about(self) -> dict[str, Any]:
        """What a sweep's folder must have been made with, so that its runs can be used again."""
        source = self.source
        if source.data_dir is not None:
            tables = {path.name: _digest(path) for path in table_files(source.data_dir)}
        else:
            tables = {"table": _digest(source.data) if source.data is not None else f"generated {source.generate}"}
        return {
            "tables": tables,
            "clients": source.clients,
            "partition": source.partition,
            "encoding": [source.form.encoding, source.form.decimal],
            "held_out": _digest(self.held_out) if self.held_out is not None else None,
        }


@dataclass(frozen=True, kw_only=True)
class _Job:
    federation: str  # canonical
    folder: Path
    how: How
    device: str


def run_all(
    points: Iterable[Point],
    folder: Path,
    how: How,
    *,
    seeds: Sequence[int],
    done: Done = lambda point, seed, outcome, now: None,
) -> Iterator[Result]:
    """Runs every point with every seed, and yields each point when all its runs have ended.

    Args:
        points: the next is asked for when there is a process for it.
        done: is told of each run, its seed and how it ended, and whether that was now or before.

    Raises:
        RunFolderError: the folder has another sweep, or another process is at work in it, or it cannot be written.
        WorkerLost: a process was ended from outside. What is done stays done.
    """
    with _owned(folder, how), _processes(how.processes) as pool:
        waiting = ((point, seed) for point in points for seed in seeds)
        running: dict[Future[Outcome], tuple[Point, int]] = {}
        found: dict[str, Result] = {}
        started, more = 0, True
        try:
            while more or running:
                while more and len(running) < how.processes:
                    if (following := next(waiting, None)) is None:
                        more = False
                        break
                    point, seed = following
                    job = _job(point, seed, folder, how, number=started)
                    started += 1
                    if (before := _outcome(job)) is None:
                        running[_submit(pool, job)] = following
                    elif (result := _note(found, point, seed, before, seeds, done, now=False)) is not None:
                        yield result
                # Not for ever: a signal that another thread was given is heard when this one next runs.
                ended, _ = wait(running, HEAR_S, return_when=FIRST_COMPLETED) if running else ((), ())
                for future in ended:
                    point, seed = running.pop(future)
                    if (result := _note(found, point, seed, future.result(), seeds, done, now=True)) is not None:
                        yield result
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a process of the sweep was ended from outside; the system may have had too little memory. Complete "
                "runs are kept: start it again, with fewer --workers"
            ) from error


def _submit(pool: ProcessPoolExecutor, job: _Job) -> Future[Outcome]:
    """Begins a run, in a process that is perhaps started for it, and must not hear of Ctrl-C while it imports."""
    with without_interrupts():
        return pool.submit(_run, job)


def _note(
    found: dict[str, Result],
    point: Point,
    seed: int,
    outcome: Outcome,
    seeds: Sequence[int],
    done: Done,
    *,
    now: bool,
) -> Result | None:
    """The point's result, if this was its last run."""
    done(point, seed, outcome, now)
    result = found.setdefault(point.name, Result(point=point, outcomes={}))
    result.outcomes[seed] = outcome
    return result if len(result.outcomes) == len(seeds) else None


def _job(point: Point, seed: int, folder: Path, how: How, *, number: int) -> _Job:
    federation = point.federation.with_seed(seed)
    where = folder / "runs" / point.name / f"seed-{seed}"
    device = resolve_device(how.device, exact=federation.privacy.row is not None)
    in_turn = devices_for(device, how.processes)
    return _Job(federation=federation.canonical, folder=where, how=how, device=str(in_turn[number % len(in_turn)]))


def _outcome(job: _Job) -> Outcome | None:
    """Of a run that was completed before."""
    try:
        written = json.loads((job.folder / SCORES).read_text())
        if written.pop("federation") != federations.from_canonical(job.federation).fingerprint:
            return None
        return Outcome(**written)
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def _owned(folder: Path, how: How) -> Iterator[None]:
    """The folder, for one sweep at a time of what it was made for."""
    about = folder / ABOUT
    with ExitStack() as stack:
        try:
            now = how.about()
            if folder.exists() and not about.exists() and any(folder.iterdir()):
                raise RunFolderError(f"{folder}: not the folder of a sweep; name another with --out")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(files.locked(folder / ".lock"))
            except BlockingIOError:
                raise RunFolderError(f"{folder}: another sweep is at work in this folder") from None
            if about.exists() and json.loads(about.read_text()) != now:
                raise RunFolderError(
                    f"{folder}: has a sweep of other tables, or of tables dealt otherwise ({ABOUT} says which); name "
                    "another with --out"
                )
            files.replace(about, (json.dumps(now, indent=2) + "\n").encode())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{folder}: cannot be used: {error}") from error
        yield


@contextmanager
def _processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Ended at once where an error, or Ctrl-C, ends the sweep."""
    pool = ProcessPoolExecutor(number, mp_context=mp.get_context("spawn"), initializer=_begin)
    others = {process.pid for process in mp.active_children()}
    try:
        yield pool
    except BaseException:
        for process in mp.active_children():
            if process.pid not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# In a process of its own


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("cloister").addHandler(logging.NullHandler())
    quiet_flower()


def _end_with_parent() -> None:
    """A run can take hours, and nobody would hear of it."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(job: _Job) -> Outcome:
    federation = federations.from_canonical(job.federation)
    if job.folder.exists():
        shutil.rmtree(job.folder)  # it was not completed
    try:
        outcome = _simulated(federation, job)
    except CloisterError as error:
        return Outcome(error=str(error))
    written = {"federation": federation.fingerprint, **asdict(outcome)}
    RunFolder.open(job.folder).write_json(SCORES, written)
    return outcome


def _simulated(federation: Federation, job: _Job) -> Outcome:
    start = read_start(job.how.start_from if federation.start is not None else None, federation)
    sites = job.how.source.sites(federation, device=torch.device(job.device))
    run = f"{federation.name}-{federation.training.seed}"
    sites.check_quorum(run=run)
    folder = RunFolder.create(federation, path=job.folder)
    result = simulate(federation, sites, folder, run=run, workers=1, start=start)
    weights = load_model(job.folder)
    if job.how.held_out is not None:
        metrics = HeldOut(federation, job.how.held_out, job.how.source.form)(weights)
    else:
        metrics = scores_on_validation_rows(federation, weights, sites)
    epsilon = {
        unit: told["epsilon"] for unit, told in result["privacy"].items() if told and told["epsilon"] is not None
    }
    return Outcome(
        metrics={name: metrics[name] for name in federation.metrics if math.isfinite(metrics.get(name, math.nan))},
        epsilon=epsilon,
        rounds=result["rounds"],
        clients=len(result["clients"]),
        seconds=result["seconds"],
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
