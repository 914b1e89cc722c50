"""Runs whose models are looked at afterwards, over seeds and several at a time: what simulations/toolbox.py measures by
more than `cloister sweep`."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from common.inference.saved import SavedModel
from common.logs import quiet_flower
from simulations.engine import run_once
from simulations.sites import Sites
from simulations.sources import Source
from simulations.sweeps.points import grid, parse


@dataclass(frozen=True, kw_only=True)
class Case:
    """Where something is tried: a document with settings, and its data."""

    name: str
    document: str
    grid: Sequence[str]
    source: Source


def privacy_of(epsilon: str) -> str:
    """An epsilon as a table names it."""
    return "no privacy" if epsilon == "inf" else f"epsilon {epsilon}"


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes of one thread each."""
    with ProcessPoolExecutor(2, mp_context=mp.get_context("spawn"), initializer=_begin) as pool:
        yield pool


def _begin() -> None:
    torch.set_num_threads(1)
    quiet_flower()


def finished(case: Case, folder: Path, seed: int) -> tuple[SavedModel, Sites]:
    """The model that a run of the case ends with, and its clients; `folder` is what simulations/toolbox.py prepares."""
    (point,) = grid(folder / case.document, parse(case.grid))
    federation = point.federation.with_seed(seed)
    sites = case.source.sites(federation, device=torch.device("cpu"))
    weights, _ = run_once(federation, sites)
    return SavedModel(federation=federation, weights=weights, round=federation.training.rounds), sites
