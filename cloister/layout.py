"""What `cloister init` writes: a federation.yaml, a folder for each participant, and the certificates' script."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import guides

if TYPE_CHECKING:
    from common.document.federation import Federation
    from common.privacy.suggestion import Suggestion
    from common.wire.address import Address

PARTICIPANTS, TABLES = "participants", "tables"
LOOPBACK = ("127.0.0.1", "localhost")
LONGEST_COLUMN = 4000  # characters that a guide has for one
POLICY_FACTOR = 2.0  # an owner's whole budget, in epsilons of this federation


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a federation begins with."""

    name: str
    about: str  # one sentence
    schema: str  # the `schema:` section, as YAML, perhaps with a warning on top
    participants: Sequence[str]
    server: Address
    epsilon: float | None  # of each row; None is no privacy
    rows: int  # of a participant's table, about
    tables: Mapping[str, Callable[[Path], object]]  # what writes each participant's table; none if all bring their own
    called: str  # how `cloister` can be called from anywhere on this machine
    simulate: str  # arguments of `cloister simulate` that try the federation out
    drafted: bool = False  # was the schema read from a table that is somebody's?

    @property
    def together(self) -> bool:
        """Are all tables public, so that they may also lie in one folder, for a simulation?"""
        return not self.drafted


def files_of(begin: Beginning) -> tuple[dict[str, str], Suggestion]:
    """Every text to be written, by its place in the new folder, and the settings that were chosen for it.

    Raises:
        ConfigError: the schema, or what goes with it, makes no valid document.
        PrivacyError: no noise keeps to that epsilon.
    """
    federation, suggestion = _federation(begin)
    texts = {
        "federation.yaml": _document(begin, federation),
        "certificates.sh": _script(begin),
        "README.md": _for_the_coordinator(begin, federation),
    }
    for name in begin.participants:
        texts[f"{PARTICIPANTS}/{name}/client.yaml"] = _client(begin, federation, name)
        texts[f"{PARTICIPANTS}/{name}/README.md"] = _for_a_participant(begin, federation, name)
    return texts, suggestion


def write(folder: Path, texts: Mapping[str, str], begin: Beginning) -> None:
    """Writes all of it, or nothing: into a draft first, in the folder itself, since the one above it may be another's
    or on another disk. Raises `OutputError` if something of it is there already, or cannot be written."""
    from common.errors import OutputError

    tops = sorted({place.split("/")[0] for place in texts} | ({TABLES} if begin.together else set()))
    there = [name for name in tops if os.path.lexists(folder / name)]
    if there:
        raise OutputError(f"{folder}: {', '.join(there)} is there already; nothing is written. Give another folder")
    try:
        with _made(folder), tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as inside:
            _fill(Path(inside), texts, begin)
            _move(tops, Path(inside), folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there; after an error one that was made for this is gone again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # somebody else put something there
                folder.rmdir()
        raise


def _fill(draft: Path, texts: Mapping[str, str], begin: Beginning) -> None:
    for place, text in texts.items():
        (draft / place).parent.mkdir(parents=True, exist_ok=True)
        (draft / place).write_text(text, encoding="utf-8", newline="\n")
    for name, table in begin.tables.items():
        table(draft / PARTICIPANTS / name / "table.csv")
        if begin.together:
            (draft / TABLES).mkdir(exist_ok=True)
            shutil.copyfile(draft / PARTICIPANTS / name / "table.csv", draft / TABLES / f"{name}.csv")


def _move(names: Sequence[str], draft: Path, folder: Path) -> None:
    """All of them, or none: what was moved before an error goes back into the draft."""
    moved: list[str] = []
    try:
        for name in names:
            (draft / name).rename(folder / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (folder / name).rename(draft / name)
        raise


def _federation(begin: Beginning) -> tuple[Federation, Suggestion]:
    """The document as a value, with settings by measured rules."""
    from common.document import documents
    from common.document.federation import Federation
    from common.errors import ConfigError
    from common.privacy.suggestion import changed, suggest

    value: dict[str, Any] = {
        "name": begin.name,
        **documents.plain_value(begin.schema),  # where no is a word, as it is to whoever loads the text
        "model": {"hidden": [32], "activation": "relu"},
        "training": {
            "rounds": 30,
            "local_steps": 1,
            "batch_size": 32,
            "optimizer": "sgd",
            "learning_rate": 0.3,
            "loss": "cross_entropy",
        },
        "strategy": {
            "name": "fedavg",
            "fraction": 1.0,
            "min_clients": len(begin.participants),
            "round_timeout": 120,
        },
        "privacy": {"row": None, "client": None, "evaluation": {"every": 10}},
    }
    if "classes" not in value["schema"]["target"]:
        value["training"]["loss"] = "mse"
    if begin.epsilon is not None:
        value["privacy"]["row"] = {
            "epsilon": begin.epsilon,
            "delta": delta_for(begin.rows),
            "clip": 1.0,
            "sampling_rate": 1.0,
            "count_epsilon": None,
        }
        value["privacy"]["evaluation"]["noise"] = 3.0
    try:
        federation = documents.validate(value, Federation)
    except documents.Mistakes as error:
        raise ConfigError([f"the federation would not be valid: {error}"]) from error
    suggestion = suggest(federation, rows=begin.rows, clients=len(begin.participants))
    return changed(federation, suggestion.changes), suggestion


def delta_for(rows: int) -> float:
    """A power of ten of at most 1 / (2 rows): above 1 / rows, delta would allow to publish a row outright."""
    power = 1
    while 10.0**-power * 2 * rows > 1:
        power += 1
    return 10.0**-power


def _document(begin: Beginning, federation: Federation) -> str:
    training, privacy = federation.training, federation.privacy
    row = privacy.row
    told = guides.NO_ROW
    if row is not None:
        told = guides.ROW.substitute(
            epsilon=_exact(row.epsilon),
            delta=_scientific(row.delta),
            clip=_exact(row.clip),
            sampling_rate=_exact(row.sampling_rate or 1.0),
        )
    return guides.FEDERATION.substitute(
        about=" ".join(begin.about.split()),  # a table's name may hold line ends
        name=begin.name,
        schema=begin.schema.rstrip() + "\n",
        hidden=list(federation.model.hidden),
        rounds=training.rounds,
        local_steps=training.local_steps,
        batch_size=training.batch_size,
        learning_rate=_exact(training.learning_rate),
        loss=training.loss,
        clients=len(begin.participants),
        privacy=told,
        every=privacy.evaluation.every,
        noise=f", noise: {_exact(privacy.evaluation.noise)}" if row is not None else "",
    )


def _exact(value: float) -> str:
    """In short, if that is the same number: what is promised is not rounded up."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _scientific(value: float) -> str:
    """As YAML takes it for a number: 1.0e-3."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _client(begin: Beginning, federation: Federation, participant: str) -> str:
    row = federation.privacy.row
    policy = guides.POLICY.substitute(
        epsilon=_exact(POLICY_FACTOR * row.epsilon) if row else "8.0",
        delta=_scientific(row.delta if row else delta_for(begin.rows)),
    )
    return guides.CLIENT.substitute(
        participant=participant,
        server=begin.server,
        federation=begin.name,
        policy=policy + ("" if row else guides.NO_PRIVACY_POLICY),
    )


def _script(begin: Beginning) -> str:
    host = begin.server.host.strip("[]")
    return guides.SCRIPT.substitute(
        federation=begin.name,
        cloister=shlex.quote(begin.called),
        hosts=" ".join(dict.fromkeys([host, *LOOPBACK])),
        participants=" ".join(begin.participants),
    )


def _for_the_coordinator(begin: Beginning, federation: Federation) -> str:
    from common.wire.channel import is_loopback

    anywhere = "[::]" if begin.server.host.startswith("[") else "0.0.0.0"
    listen = begin.server.host if is_loopback(begin.server.host) else anywhere
    warned = ", above all its bounds and categories, which were read from a table" if begin.drafted else ""
    return guides.COORDINATOR.substitute(
        federation=begin.name,
        warned=warned,
        rows=begin.rows,
        simulate=f"cloister simulate federation.yaml {begin.simulate}",
        listen=f"{listen}:{begin.server.port}",
        clients=len(begin.participants),
    )


def _for_a_participant(begin: Beginning, federation: Federation, participant: str) -> str:
    from common.text import shown

    schema = federation.data_schema
    columns = [f"- `{feature.name}`: {_words(feature)}" for feature in schema.features]
    columns.append(f"- `{schema.target.name}`: {_words(schema.target)}; what is predicted")
    columns = [shown(line, LONGEST_COLUMN) for line in columns]  # a name may hold line ends, and steps behind them
    noised = ", with noise that bounds what they can reveal about any one row" if federation.privacy.row else ""
    return guides.PARTICIPANT.substitute(
        participant=participant,
        federation=begin.name,
        others="one other" if len(begin.participants) == 2 else f"{len(begin.participants) - 1} others",
        noised=noised,
        table=guides.DEALT_TABLE if begin.tables else guides.OWN_TABLE,
        columns="\n".join(columns),
    )


def _words(column: Any) -> str:
    """A feature or a target, for whoever prepares a table."""
    from common.document.values import spelled

    if (bounds := getattr(column, "bounds", None)) is not None:
        return f"a number, from {bounds[0]:g} to {bounds[1]:g}"
    if (categories := getattr(column, "categories", None)) is not None:
        return f"one of {', '.join(map(str, categories))}"
    labels = ((label, [spelled(value) for value in values]) for label, values in column.classes.items())
    return "one of " + ", ".join(
        " or ".join(values) + ("" if values == [label] else f" ({label})") for label, values in labels
    )
