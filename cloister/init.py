"""`cloister init`: a folder from which a federation begins."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Choice

from cloister.asking import Asking
from cloister.verbs import DecimalOption, EncodingOption, app, file_format, verb

if TYPE_CHECKING:
    from cloister.layout import Beginning
    from common.data.tables import FileFormat
    from common.privacy.suggestion import Suggestion
    from common.wire.address import Address

KINDS = ("heart", "digits", "regression")
USUAL = "site-1,site-2,site-3"
HOSPITALS = "cleveland,hungarian,switzerland,va"
SERVER = "127.0.0.1:8443"
EPSILON = "4"
MOST_ROWS = 10**9


@app.command()
@verb
def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIRECTORY]", help="Folder to write to.")] = Path("."),
    table: Annotated[
        Path | None, typer.Option("--from", metavar="TABLE", help="Draft the schema from this table.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="With --from: the column to predict [default: the last usable].")
    ] = None,
    example: Annotated[
        str | None, typer.Option(click_type=Choice(KINDS), help="Instead of a table: an example, with its tables.")
    ] = None,
    participants: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help=f"Who takes part [default: {USUAL}].")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help=f"Where clients find the server [default: {SERVER}].")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the federation [default: the folder's, or the example's].")
    ] = None,
    epsilon: Annotated[
        str | None, typer.Option(help=f"Privacy of each row in a whole run, or none [default: {EPSILON}].")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_ROWS,
            help="With --from: of each participant's table, about [default: its share of this table].",
        ),
    ] = None,
    deal: Annotated[
        bool, typer.Option("--deal", help="With --from: deal its rows to the participants, to try it out.")
    ] = False,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; what is not given has its default.")] = False,
) -> None:
    """Begin a federation: its document, a folder for each participant, and a script that makes the certificates.

    On a terminal it asks for what is not given. Settings are chosen by measured rules, as by `cloister plan --suggest`.

    Example: `cloister init flats --example regression`
    """
    from cloister import layout
    from common.errors import ConfigError

    asking = Asking(enabled=sys.stdin.isatty() and not yes)
    if table is not None and example is not None:
        raise ConfigError(["give --from TABLE or --example NAME, not both"])
    if table is None and example is None:
        question = f"A table to begin from, or an example ({', '.join(KINDS)})"
        said = asking.answer(None, "--from TABLE or --example NAME", question, str, default=None)
        table, example = (None, said) if said in KINDS else (Path(said), None)
    if example is not None and (target is not None or rows is not None or deal):
        raise ConfigError(["--target, --rows and --deal belong to --from; an example has all of them"])
    usual = HOSPITALS if example == "heart" else USUAL
    called = _plain(example or directory.resolve().name)
    given = Given(
        participants=asking.answer(participants, "--participants", "Who takes part", _names, default=usual),
        server=asking.answer(server, "--server", "Where clients find the server", _address, default=SERVER),
        name=asking.answer(name, "--name", "The federation's name", _name, default=called),
        epsilon=asking.answer(epsilon, "--epsilon", "Epsilon of each row, or none", _epsilon, default=EPSILON),
    )
    if example is not None:
        begin = _from_example(example, given)
    else:
        assert table is not None
        begin = _from_table(table, target, given, rows=rows, deal=deal, form=file_format(encoding, decimal))
    texts, suggestion = layout.files_of(begin)
    layout.write(directory, texts, begin)
    if begin.drafted:
        print("warning: bounds and categories were read from the data and are not private", file=sys.stderr)
    print("\n".join(_told(directory, begin, suggestion)))


@dataclass(frozen=True, kw_only=True)
class Given:
    """What was given or answered, whatever the federation is made from."""

    participants: tuple[str, ...]
    server: Address
    name: str
    epsilon: float | None


def _from_example(example: str, given: Given) -> Beginning:
    from simulations import examples

    found = examples.EXAMPLES[example](given.participants)
    return _beginning(
        given,
        about=found.about,
        schema=found.schema,
        rows=found.rows,
        tables=found.tables,
        simulate="--data-dir tables",
    )


def _from_table(
    table: Path, target: str | None, given: Given, *, rows: int | None, deal: bool, form: FileFormat
) -> Beginning:
    from common.data import tables
    from common.data.drafting import draft
    from simulations import examples

    schema = draft(table, target=target, form=form)
    read = tables.read_any(table, form)
    number = len(given.participants)
    dealt = examples.deal(read.frame, given.participants, separator=examples.separator_for(read)) if deal else {}
    options = [f"--data {_quoted(table.resolve())}", f"--clients {number}"]
    options += [f"--encoding {form.encoding}"] if form.encoding else []
    options += [f"--decimal {form.decimal}"] if form.decimal else []
    return _beginning(
        given,
        about=f"What will be said of the column to predict, from {table.name}? Replace this line by the question.",
        schema=schema,
        rows=rows or -(-read.frame.height // number),
        tables=dealt,
        drafted=True,
        simulate=" ".join(options),
    )


def _beginning(given: Given, **more: Any) -> Beginning:
    from cloister.layout import Beginning

    return Beginning(**vars(given), called=_called(), **more)


def _told(directory: Path, begin: Beginning, suggestion: Suggestion) -> list[str]:
    """What was written, why it is as it is, and what to do next."""
    from cloister.plan import reasons  # here, since importing a verb adds it to the help

    where = "" if directory == Path(".") else f"{directory}/"

    go = "" if not where else f"cd {_quoted(directory)} && "
    return [
        f"{where}federation.yaml: what all parties agree on",
        f"{where}participants/NAME: a folder for each of {', '.join(begin.participants)}",
        f"{where}certificates.sh: makes the certificates",
        f"{where}README.md: what to do, step by step",
        "",
        f"settings for tables of about {begin.rows:,} rows, by rules that were measured:",
        *reasons(suggestion),
        "",
        "next, try it on this machine, without a network:",
        f"  {go}{begin.called} simulate federation.yaml {begin.simulate}",
    ]


def _plain(text: str) -> str:
    """A name like it that can be a federation's."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:64]
    return plain or "federation"


def _name(text: str) -> str:
    from common.text import PLAIN_NAME

    if not re.fullmatch(PLAIN_NAME, text):
        raise ValueError("must be letters, digits, dots, dashes and underscores, and begin with a letter or digit")
    return text


def _names(text: str) -> tuple[str, ...]:
    from common.certificates.files import OPERATOR, RESERVED

    own = (*RESERVED, OPERATOR)
    names = tuple(_name(part.strip()) for part in text.split(","))
    if len({name.lower() for name in names}) < len(names):
        raise ValueError("must be different names")
    taken = [name for name in names if name.lower() in own]
    if taken:
        raise ValueError(f"must be other names than {', '.join(own)}, which the certificates' folder uses")
    return names


def _address(text: str) -> Address:
    from common.wire import address

    return address.parse(text)


def _epsilon(text: str) -> float | None:
    if text.lower() in ("none", "inf"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError("must be a number greater than 0, or none for no differential privacy")
    return value


def _called() -> str:
    """How `cloister` is called on this machine, from any folder."""
    if shutil.which("cloister") is not None:
        return "cloister"
    return str(Path(sys.argv[0]).resolve()) if Path(sys.argv[0]).name.startswith("cloister") else "cloister"


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
