"""What makes a restarted server continue after the last complete round.

A checkpoint is one file in the run folder's `checkpoint/`: the model, the strategy's moments and all else that the
next round depends on. It appears by one atomic rename, its name carries the hash of its content, and the one before
is kept: a file that was torn or damaged is not taken, and the one before it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from common import files
from common.document import federation as federations
from common.errors import RunFolderError
from common.inference.saved import SavedModel
from common.privacy.statement import Statement
from server.rounds.client_privacy import Charged, Spent
from server.rounds.events import from_json
from server.rounds.run import Progress, Run

FORMAT = 1
KEPT = 2
FOLDER = "checkpoint"

# Fields of `Progress`, by how JSON holds them.
_KEPT = (
    "round",
    "averaged",
    "tried",
    "pending",
    "evaluation",
    "held_out_score",
    "best",
    "stale",
    "plateaus",
    "advised",
)
_BY_NODE = ("gone", "strikes", "resting")
_SETS = ("clients", "present")
_ADDED = ("averaged", "held_out_score", "plateaus", "advised")  # older checkpoints lack these

log = logging.getLogger("cloister.server")


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was saved."""

    number: int  # counts the checkpoints of a run
    run: str
    fingerprint: str
    rounds: int  # that the run was to have
    seconds: float  # that the run has taken so far
    progress: Progress

    @property
    def round(self) -> int:
        """The last complete round."""
        return self.progress.round


def save(folder: Path, run: Run, *, number: int, seconds: float) -> None:
    """Writes the checkpoint `number` of a run, durably, and removes those before the last.

    Raises:
        RunFolderError: it could not be written; those before it are as they were.
    """
    progress = run.progress
    memory = progress.memory
    about: dict[str, Any] = {name: getattr(progress, name) for name in (*_KEPT, *_BY_NODE)}
    about |= {name: sorted(getattr(progress, name)) for name in _SETS}
    about["statements"] = {name: statement.to_wire() for name, statement in progress.statements.items()}
    about["event"] = progress.event and progress.event.to_json()
    if progress.spent is not None:
        about |= asdict(progress.spent)
    header = {
        "format": FORMAT,
        "run": run.name,
        "federation": run.federation.fingerprint,
        "rounds": run.federation.training.rounds,
        "seconds": seconds,
        "state": list(progress.weights),
        "memory": list(memory),
        "about": about,
    }
    arrays: dict[str, NDArray[Any]] = {f"state/{name}": array for name, array in progress.weights.items()}
    arrays |= {f"average/{name}": array for name, array in (progress.average or {}).items()}
    arrays |= {f"memory/{name}": array for name, array in memory.items()}
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    data = safetensors.save(contiguous, metadata={"cloister": json.dumps(header)})
    place = folder / FOLDER
    path = place / f"{number:09d}-{_digest(data)}.safetensors"
    try:
        place.mkdir(exist_ok=True, mode=0o700)
        files.replace(path, data)  # durably: before anyone acts on it
        for old in (*_all(folder)[KEPT:], *place.glob("*.new")):  # the drafts of servers that died within one
            old.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written: {error.strerror}; the checkpoint before it is whole: make room, and "
            f"`cloister serve --resume {folder}` goes on from there"
        ) from error


def load(folder: Path, *, may_fall_back: bool = True) -> Checkpoint:
    """The newest whole checkpoint of a run folder.

    Args:
        may_fall_back: take the one before a damaged one. With `privacy.client` that would make a round again whose
            noisy model has left already: two releases at the price of one.

    Raises:
        RunFolderError: there is none that may be taken.
    """
    found = _all(folder)
    for path in found:
        try:
            return read(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            if not may_fall_back:
                raise RunFolderError(
                    f"{path}: damaged ({error}); going on from the checkpoint before it would release a round of "
                    "privacy.client twice and charge it once: begin a new run"
                ) from error
            log.warning("%s: torn or damaged (%s); the checkpoint before it is taken", path, error)
    what = f"none of its {len(found)} checkpoints is whole" if found else "it has no checkpoint"
    raise RunFolderError(f"{folder}: cannot be resumed: {what}")


def _all(folder: Path) -> list[Path]:
    """A run folder's checkpoints, the newest first."""
    return sorted((folder / FOLDER).glob("[0-9]*.safetensors"), reverse=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def saved_model(path: Path) -> SavedModel:
    """The model of a checkpoint in a run folder, with the folder's document.

    Raises:
        RunFolderError: the file is damaged, or lies in no run folder.
        ConfigError: the folder's federation.yaml has mistakes.
        ModelError: the model is not of that document, or not finite.
    """
    folder = path.resolve().parent.parent
    if not (folder / "federation.yaml").is_file():
        raise RunFolderError(f"{path}: a checkpoint is used where it lies: in checkpoint/ of its run folder")
    federation = federations.load(folder / "federation.yaml")
    try:
        checkpoint = read(path)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise RunFolderError(f"{path}: torn or damaged ({error})") from error
    progress = checkpoint.progress
    return SavedModel(federation=federation, weights=progress.model, round=progress.round, run=checkpoint.run).checked(
        str(path)
    )


def read(path: Path) -> Checkpoint:
    """One checkpoint. Raises OSError, or (torn or damaged) ValueError, LookupError, TypeError, AttributeError or
    SafetensorError."""
    number, _, digest = path.stem.partition("-")
    data = path.read_bytes()
    if _digest(data) != digest:
        raise ValueError("its content is not what its name says")
    arrays = safetensors.load(data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["cloister"])
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}; this version of Cloister reads {FORMAT}")
    return Checkpoint(
        number=int(number),
        run=header["run"],
        fingerprint=header["federation"],
        rounds=header["rounds"],
        seconds=header["seconds"],
        progress=_progress(header, arrays),
    )


def _progress(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Progress:
    about = header["about"]
    kept = {name: about[name] for name in _KEPT if name in about or name not in _ADDED}
    kept |= {
        name: {int(node): value for node, value in about[name].items()} for name in _BY_NODE
    }  # JSON's keys are text
    kept |= {name: set(about[name]) for name in _SETS}
    kept["statements"] = {name: Statement.from_wire(told) for name, told in about["statements"].items()}
    if about["event"] is not None:
        kept["event"] = from_json(about["event"])
    if "charged" in about:
        kept["spent"] = Spent(Charged(**about["charged"]), about["clip"])
    return Progress(
        weights={name: arrays[f"state/{name}"] for name in header["state"]},
        average={name: arrays[f"average/{name}"] for name in header["state"]} if about.get("averaged") else None,
        memory={name: arrays[f"memory/{name}"] for name in header["memory"]},
        **kept,
    )
