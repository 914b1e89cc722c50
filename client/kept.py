"""The models that a client keeps: of each run that it took part in the last one, so that whoever gave data to a model
has it.

One file a run (common/inference/saved.py), in a folder of the client's state. A model arrives with each task, as it was
after the last complete round, and once more when the run ends.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import files
from common.document.federation import Federation
from common.errors import ModelError
from common.inference import saved
from common.inference.saved import SavedModel
from common.model.weights import Weights

WRITTEN_EVERY_S = 0.2  # a small round takes less than writing a file
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

log = logging.getLogger("cloister.client")


class KeptModels:
    """Where a client keeps models of one federation. What cannot be written ends no training."""

    def __init__(self, folder: Path, federation: Federation) -> None:
        self._folder, self._federation = folder, federation
        self._waiting: Callable[[], SavedModel] | None = None
        self._written = -math.inf
        self._warned = False

    def note(self, weights: Weights, *, run: str, complete: int, privacy: Callable[[], Mapping[str, Any]]) -> None:
        """Keeps the model that `complete` rounds of a run have made, now or in a moment. `privacy` says what it cost
        (privacy.json's form); it is asked when the model is written."""
        if complete < 1:
            return

        def model() -> SavedModel:
            return SavedModel(
                federation=self._federation, weights=weights, round=complete, run=run, privacy=dict(privacy())
            )

        self._waiting = model
        if time.monotonic() - self._written > WRITTEN_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Writes what waits to be written."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        try:
            keep(self._folder, waiting(), durable=False)
        except ModelError as error:
            if not self._warned:
                log.warning("%s; training goes on without it", error)
            self._warned = True
        self._written = time.monotonic()

    def forget(self) -> None:
        """Drops what waits: a later model was kept."""
        self._waiting = None


def keep(folder: Path, model: SavedModel, *, durable: bool = True, mode: int = files.MODE) -> Path:
    """Writes a model, whole, in place of an earlier one of its run. Raises `ModelError` if that is not possible."""
    path = place(folder, model.run)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.replace(path, saved.to_bytes(model), durable=durable, mode=mode)
    except OSError as error:
        raise ModelError(f"{path}: the model cannot be kept: {error.strerror}") from error
    return path


def place(folder: Path, run: str) -> Path:
    """Where the model of a run is kept: by the run's name, if that can be a file's."""
    name = run if FILE_NAME.fullmatch(run) else hashlib.sha256(run.encode()).hexdigest()[:32]
    return folder / f"{name}.safetensors"


def newest(folder: Path) -> Path:
    """The file that was written last. Raises `ModelError` if there is none."""
    try:
        found = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error.strerror}") from error
    if not found:
        raise ModelError(
            f"{folder}: no model yet; a client keeps one once a run's first round is complete, and `cloister fetch` "
            "asks the server for it"
        )
    return found[-1]


def with_own(model: SavedModel, own: Mapping[str, Any]) -> SavedModel:
    """A model of the server's with what this client has stated itself, by its name; the server tells of none."""
    row = model.privacy.get("row")
    if not isinstance(row, Mapping) or not own:
        return model
    return replace(model, privacy={**model.privacy, "row": {**row, "per_client": dict(own)}})
