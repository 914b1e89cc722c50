"""A run written down in its folder: a checkpoint, then the model for those who read it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from common.errors import RunFolderError
from server.folder import checkpoint as checkpoints
from server.folder.checkpoint import Checkpoint
from server.folder.folder import RunFolder
from server.folder.statement import statement
from server.rounds.run import Run

SAVED_EVERY_S = 0.2


class FolderJournal:
    """The journal (server/rounds/run.py) of a run that has a folder."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        settle: Callable[[], None] | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`settle` lets clients forget their replies. Without it no round leaves a checkpoint, and nothing can be
        resumed. `checkpoint` is the one that the run goes on from."""
        self._folder, self._settle = folder, settle
        self._numbers = itertools.count(checkpoint.number + 1 if checkpoint else 0)
        self._saved = -math.inf
        self._started = time.monotonic() - (checkpoint.seconds if checkpoint else 0.0)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, in all its processes."""
        return time.monotonic() - self._started

    def save(self, run: Run) -> None:
        if self._settle is not None:
            number = next(self._numbers)
            checkpoints.save(self._folder.path, run, number=number, seconds=self.seconds)
        if run.client_privacy is not None:
            run.client_privacy.told_clip = run.client_privacy.clip
        # Where nothing can be resumed nor was charged, a model that is a moment old does until the run ends: writing
        # one takes as long as a small round.
        resumable = self._settle is not None or run.client_privacy is not None
        if resumable or time.monotonic() - self._saved > SAVED_EVERY_S:
            self.save_model(run)
            self._saved = time.monotonic()

    def settle(self) -> None:
        if self._settle is not None:
            self._settle()

    def charge(self, run: Run) -> None:
        self._folder.write_json("privacy.json", statement(run))

    def save_model(self, run: Run, *, durably: bool = False) -> None:
        progress = run.progress
        charged = asdict(run.client_privacy.charged) if run.client_privacy else None
        self._folder.save_model(progress.model, server_round=progress.round, charged=charged, durably=durably)

    def undo_what_is_not_saved(self, run: Run) -> None:
        """A round that was cut off will be made again, with other noise: nothing of it may be told, or it would have
        been released twice and charged once."""
        if self._settle is not None:
            with suppress(RunFolderError):
                run.progress = checkpoints.load(self._folder.path).progress
                if run.client_privacy is not None and run.progress.spent is not None:
                    run.client_privacy.restore(run.progress.spent)
