"""The observer that feeds a tracker: as a run goes, or later by the events of its folder, to the same figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from common.document.federation import Federation
from common.errors import CloisterError
from server.observers.trackers.tracker import Tracker, params_of, scalars_of
from server.rounds.events import Ended, Event, Resumed, RoundEnded, Started

Kind = Literal["tensorboard", "mlflow"]
Open = Callable[[str, float], Tracker]  # by the run's name, and when it began
FOLDER = "tensorboard"  # of the event files, in a run folder

log = logging.getLogger("cloister.server")


class Tracking:
    """Give it every event of a run, from the first. Rounds that the tracker holds already are passed over: so a run can
    be tracked again, and what a tracker missed is added."""

    def __init__(self, federation: Federation, opened: Open) -> None:
        self._federation, self._opened = federation, opened
        self._tracker: Tracker | None = None
        self._done = 0
        self.place = ""  # where the run is; "" before it began

    def __call__(self, event: Event) -> None:
        """Raises `OutputError` or `ConnectionFailed` if the tracker fails."""
        if isinstance(event, Started | Resumed) and self._tracker is None:
            self._tracker = self._opened(event.run, event.time)
            self._done, self.place = self._tracker.done, self._tracker.place
            self._tracker.params(params_of(self._federation), time=event.time)
        elif isinstance(event, RoundEnded) and self._tracker is not None and event.round > self._done:
            self._tracker.scalars(scalars_of(event), step=event.round, time=event.time)
            self._done = self._done if event.failed else event.round
        elif isinstance(event, Ended) and self._tracker is not None:
            self._tracker.close(event.status, time=event.time)
            self._tracker = None  # a run that ended may go on


def opener(kind: Kind, federation: Federation, *, folder: Path, uri: str | None = None) -> Open:
    """How a tracker of this kind is opened.

    Args:
        folder: of TensorBoard's event files, of this run alone.
        uri: of MLflow's tracking server or store; by default MLFLOW_TRACKING_URI.
    """
    if kind == "tensorboard":
        from server.observers.trackers.tensorboard import EventFiles

        return lambda run, began: EventFiles(folder)
    from server.observers.trackers.mlflow import MlflowRun

    return lambda run, began: MlflowRun(uri, experiment=federation.name, run=run, began=began)


def live(
    kinds: Sequence[Kind], federation: Federation, folder: Path, *, past: Iterable[Event], warn: Callable[[str], None]
) -> list[Callable[[Event], None]]:
    """Observers of a run that begins or goes on, whose folder has its `past`. None of them ends the run: of one that
    fails `warn` is told once, and it is left alone from then on."""
    observers = []
    for kind in dict.fromkeys(kinds):
        tracking = Tracking(federation, opener(kind, federation, folder=folder / FOLDER))
        observers.append(_harmless(tracking, kind, folder, warn))
    for event in past:
        for observer in observers:
            observer(event)
    return observers


def _harmless(observer: Tracking, kind: Kind, folder: Path, warn: Callable[[str], None]) -> Callable[[Event], None]:
    works = True

    def tell(event: Event) -> None:
        nonlocal works
        if not works:
            return
        try:
            observer(event)
        except CloisterError as error:
            works = False
            warn(f"{kind}: {error}; the run goes on untracked, `cloister track {folder}` adds what is missing")
        except Exception:  # a bug, which keeps its traceback; it is no fault of the run
            works = False
            log.exception("%s: the run goes on untracked", kind)

    return tell
