"""The run folder: what a run leaves behind, and the contract for everything that reads a run.

    federation.yaml    the document, every default written out
    events.jsonl       one JSON object a line, as the run goes
    model.safetensors  the model after the last complete round
    result.json        how the run ended
    privacy.json       what was released about whom, and what that costs
    start.json         where the first model is from, if from another run or file (server/folder/start.py)
    summary.md         what the model relies on as the run goes, if asked for (server/observers/summary.py)
    explanation.json   what the model goes by, if somebody asked (`cloister explain`)
    report.html        the run to look at, and model_card.md to read (`cloister report`)
    tensorboard/       the run for TensorBoard, if asked for (`cloister track`)
    checkpoint/        what a restarted server goes on from (server/folder/checkpoint.py)

Files are replaced whole, by rename; events are appended a line at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from common import files
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import RunFolderError
from common.inference import saved
from common.inference.saved import SavedModel, read_arrays
from common.model.weights import Weights
from server.folder.statement import for_clients
from server.rounds.events import Event, Refused, Resumed, RoundEnded, Serving, Standing, Started, after, from_json

START = "start.json"


class RunFolder:
    """Made by `create`, before anything else of a run happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, federation: Federation, *, path: Path | None = None, root: Path = Path("runs")) -> RunFolder:
        """A new folder, at `path` or under `root` with the time and the federation's name.

        Raises:
            RunFolderError: `path` exists, or the folder cannot be made.
        """
        try:
            if path is not None:
                path.mkdir(parents=True)
            else:
                path = _fresh(root, federation.name)
        except FileExistsError:
            raise RunFolderError(f"{path}: exists already; name another folder, or move it away") from None
        except OSError as error:
            raise RunFolderError(f"{path or root}: cannot be made: {error.strerror}") from error
        folder = cls(path)
        folder.write_document(federation)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run's folder, to go on with the run. Raises `RunFolderError` if it is not one."""
        if not (path / "federation.yaml").is_file():
            raise RunFolderError(f"{path}: not the folder of a run: it has no federation.yaml")
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other servers out. Raises `RunFolderError` if one is at work here."""
        with ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.path / ".lock"))
            except BlockingIOError:
                raise RunFolderError(f"{self.path}: another server is at work in this folder") from None
            yield

    def is_served(self) -> bool | None:
        """Is a server at work here? None if that is not known: none ever was, as of a simulation, or the lock cannot be
        tried. It is held for an instant, in which a server that starts would be kept out."""
        if not any(isinstance(event, Serving) for event in self.events()):
            return None
        try:
            with self.lock():
                return False
        except RunFolderError:
            return True
        except OSError:
            return None

    def result(self) -> dict[str, Any]:
        """How the run ended; empty while it goes on. Raises `RunFolderError` if result.json is damaged."""
        return _json(self.path / "result.json")

    def start(self) -> dict[str, Any]:
        """Where the run's first model is from; empty if its seed drew it. Raises `RunFolderError` if damaged."""
        return _json(self.path / START)

    def is_complete(self) -> bool:
        """Has the run ended, with nothing left to do?"""
        try:
            return bool(self.result().get("status") == "completed")
        except RunFolderError:
            return False

    def mend(self) -> None:
        """Cuts off a last event that was torn, and takes away how the run ended before."""
        (self.path / "result.json").unlink(missing_ok=True)
        with (self.path / "events.jsonl").open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def write_document(self, federation: Federation) -> None:
        """Replaces federation.yaml."""
        document = yaml.safe_dump(json.loads(federation.canonical), sort_keys=False, allow_unicode=True)
        self.write("federation.yaml", document.encode())

    def record(self, event: Event) -> None:
        """Appends one event."""
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event.to_json()) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.path / 'events.jsonl'}: cannot be written: {error.strerror}") from error

    def events(self) -> Iterator[Event]:
        """What is written of the run, but for lines that a full disk tore."""
        path = self.path / "events.jsonl"
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                yield from_json(json.loads(line))

    def standing(self) -> Standing:
        """How the run stands, by its events."""
        return _reduced(self.path, self.events())

    def save_model(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        *,
        server_round: int,
        charged: Mapping[str, int] | None = None,
        durably: bool = True,
    ) -> None:
        """Replaces the model. Its metadata has the order of its arrays, and with `privacy.client` what it cost so far
        (server/rounds/client_privacy.py): model and charge are one file, so neither is there without the other."""
        # One entry: safetensors writes several in any order, and equal runs should leave equal files.
        about = {"round": server_round, "order": list(weights)} | ({"charged": dict(charged)} if charged else {})
        metadata = {"cloister": json.dumps(about)}
        arrays = {name: np.ascontiguousarray(value) for name, value in weights.items()}
        self.write("model.safetensors", safetensors.save(arrays, metadata=metadata), durably=durably)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replaces one JSON file."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def write(self, name: str, data: bytes, *, durably: bool = True) -> None:
        """Replaces one file: the old one or the new one is there, never a part; `durably`, also after a power cut."""
        try:
            files.replace(self.path / name, data, durable=durably)
        except OSError as error:
            raise RunFolderError(f"{self.path / name}: cannot be written: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder says of its run."""

    path: Path
    federation: Federation
    standing: Standing
    run: str  # the run's name; "" if it never started
    started: float  # seconds since 1970; 0 if it never did
    rounds: tuple[RoundEnded, ...]  # complete and failed ones, in the order of the events
    refused: tuple[Refused, ...]
    result: Mapping[str, Any]  # result.json; empty while the run goes on
    privacy: Mapping[str, Any]  # privacy.json; empty until something is charged
    explanation: Mapping[str, Any]  # explanation.json (`cloister explain`); empty without
    start: Mapping[str, Any]  # start.json; empty where the seed drew the first model


def read_run(path: Path) -> RunRecord:
    """All that a run folder says, also of a run that goes on or failed.

    Raises:
        RunFolderError: it is no run's folder, or a file is damaged.
        ConfigError: its federation.yaml has mistakes.
    """
    folder = RunFolder.open(path)
    if not (path / "events.jsonl").is_file():
        raise RunFolderError(f"{path}: not the folder of a run, or of one that never began: it has no events.jsonl")
    federation = federations.load(path / "federation.yaml")
    events = list(folder.events())
    begun = [event for event in events if isinstance(event, Started | Resumed)]
    return RunRecord(
        path=path,
        federation=federation,
        standing=_reduced(path, events),
        run=begun[0].run if begun else "",
        started=begun[0].time if begun else 0.0,
        rounds=tuple(event for event in events if isinstance(event, RoundEnded)),
        refused=tuple(event for event in events if isinstance(event, Refused)),
        result=folder.result(),
        privacy=_json(path / "privacy.json"),
        explanation=_json(path / "explanation.json"),
        start=folder.start(),
    )


def _reduced(path: Path, events: Iterable[Event]) -> Standing:
    """How a run stands after events of its folder. Raises `RunFolderError` if one of them holds what is none's."""
    standing = Standing()
    try:
        for event in events:
            standing = after(standing, event)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{path / 'events.jsonl'}: damaged: {error}") from error
    return standing


def load_model(folder: Path) -> Weights:
    """The model of a run folder. Raises `RunFolderError` if there is none, or it is damaged."""
    return _model(folder)[1]


def saved_model(folder: Path) -> SavedModel:
    """The model of a run folder with its document, and what it cost.

    Raises:
        RunFolderError: it is no run's folder, no round is complete, or a file is damaged.
        ConfigError: its federation.yaml has mistakes.
        ModelError: the model is not of that document, or not finite.
    """
    RunFolder.open(folder)
    federation = federations.load(folder / "federation.yaml")
    about, weights = _model(folder)
    return SavedModel(
        federation=federation,
        weights=weights,
        round=int(about["round"]),
        run=next((event.run for event in RunFolder(folder).events() if isinstance(event, Started | Resumed)), ""),
        privacy=_json(folder / "privacy.json"),
    ).checked(f"{folder / 'model.safetensors'}")


def model_for_clients(folder: Path) -> bytes:
    """The model of a run folder as clients are given it (common/inference/saved.py). Raises as `saved_model`."""
    model = saved_model(folder)
    return saved.to_bytes(replace(model, privacy=for_clients(model.privacy)))


def _model(folder: Path) -> tuple[dict[str, Any], Weights]:
    path = folder / "model.safetensors"
    try:
        about, arrays = read_arrays(path.read_bytes())
        return {"round": int(about["round"])}, {name: arrays[name] for name in about["order"]}
    except FileNotFoundError:
        raise RunFolderError(f"{path}: there is none; a run has a model once its first round is complete") from None
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunFolderError(f"{path}: not the model of a run, or damaged") from error


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; empty if it is not there yet. Raises `RunFolderError` if it is damaged."""
    try:
        held = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise RunFolderError(f"{path}: damaged: it holds no object")
    return held


def _fresh(root: Path, name: str) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    for number in range(1, 1000):
        path = root / (f"{stamp}-{name}" if number == 1 else f"{stamp}-{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise RunFolderError(f"{root}: no free name for a run folder")
