"""A run as TensorBoard's event files.

By tensorboard's own record writer, event by event: it needs no torch, and where a disk is full it says so, while the
usual summary writers queue for a thread. Files are named without the machine's name.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from common.errors import OutputError
from server.observers.trackers.tracker import COMPLETE, Param
from server.rounds.events import Status

PREFIX = "events.out.tfevents."  # by which TensorBoard knows its files, which it reads in the order of their names


class EventFiles:
    """A folder of event files, of one run: each time that it is opened, a file is added."""

    def __init__(self, folder: Path) -> None:
        self.place, self._folder = str(folder), folder
        self._path: Path | None = None  # of the file that is written
        with self._writing():
            files = sorted(folder.glob(f"{PREFIX}*"))
            self._is_new = not files
            self._step = self.done = max((_last(path) for path in files), default=0)

    def params(self, told: Mapping[str, Param], *, time: float) -> None:
        if self._is_new:
            summary = hparams_pb(dict(told), trial_id=str(told["fingerprint"]), start_time_secs=time)
            self._write(Event(wall_time=time, summary=summary))

    def scalars(self, told: Mapping[str, float], *, step: int, time: float) -> None:
        self._step = step
        values = [Summary.Value(tag=name, simple_value=value) for name, value in told.items()]
        self._write(Event(wall_time=time, step=step, summary=Summary(value=values)))

    def close(self, status: Status, *, time: float) -> None:
        if self._path is None:  # nothing is added to what is there
            return
        text = TensorProto(dtype=DT_STRING, string_val=[status.encode()])
        value = Summary.Value(tag="status", tensor=text, metadata=create_summary_metadata("status", "How it ended."))
        self._write(Event(wall_time=time, step=self._step, summary=Summary(value=[value])))

    def _write(self, event: Event) -> None:
        with self._writing():
            if self._path is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._path = self._folder / f"{PREFIX}{clock.time_ns()}"
                self._append(self._path, Event(wall_time=event.wall_time, file_version="brain.Event:2"))
            self._append(self._path, event)

    def _append(self, path: Path, event: Event) -> None:
        with path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be written: {error.strerror}") from error


def _last(path: Path) -> int:
    """The last complete round that an event file tells of."""
    found = 0
    for event in LegacyEventFileLoader(str(path)).Load():
        rounds = [value.simple_value for value in event.summary.value if value.tag == COMPLETE]
        found = max([found, *map(int, rounds)])
    return found
