"""What the verbs share: the application that they are added to, their common options, and how their errors end."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Choice

if TYPE_CHECKING:
    from common.data.tables import FileFormat

app = typer.Typer(
    help="Federated learning for data that may not be shared: the data owner holds the privacy budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

FederationFile = Annotated[Path, typer.Argument(metavar="FEDERATION.YAML", help="The federation document.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder to make [default: a new one under runs/].")]
HeldOutOption = Annotated[Path | None, typer.Option(help="Table to score every round's model on, exactly.")]
ExplainEveryOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="ROUNDS", help="With --held-out: so often, write what the model relies on."),
]
EncodingOption = Annotated[str | None, typer.Option(help="Encoding of CSV that is not UTF-8, as windows-1252.")]
DecimalOption = Annotated[
    str | None, typer.Option(click_type=Choice([".", ","]), help="Decimal mark of CSV [default: , beside ; else .]")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="One table, dealt to --clients by --partition.")]
DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="A folder with one table a client.")]
GenerateOption = Annotated[
    int | None, typer.Option("--generate", help="Rows to make up from the schema, to try it out.")
]
ClientsOption = Annotated[int | None, typer.Option("--clients", help="How many clients the table is dealt to.")]
PartitionOption = Annotated[
    str,
    typer.Option(
        "--partition", help="iid, dirichlet:ALPHA, shards:N, quantity:EXPONENT, shift:COLUMN, draw:ROWS, by:COLUMN."
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Seed of everything random [default: the federation's].")
]
StartFromOption = Annotated[
    Path | None,
    typer.Option(
        "--start-from", metavar="PATH", help="Run folder or safetensors file of the model that `start` names."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
NoReportOption = Annotated[bool, typer.Option("--no-report", help="Write no report.html and model_card.md.")]
TrackOption = Annotated[
    list[str] | None,
    typer.Option("--track", click_type=Choice(["tensorboard", "mlflow"]), help="As it goes; may be repeated."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
LogFormatOption = Annotated[str, typer.Option(click_type=Choice(["text", "json"]), help="What stderr carries.")]
JSONOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turns our own errors into one clear line each; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from common.errors import CloisterError, ConfigError
        from common.text import shown_lines

        try:
            function(*args, **kwargs)
        except CloisterError as error:
            for line in error.problems if isinstance(error, ConfigError) else [str(error)]:
                print(f"error: {shown_lines(line)}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None

    return run


def file_format(encoding: str | None, decimal: str | None) -> FileFormat:
    """What the command line says of CSV files."""
    from common.data.tables import FileFormat
    from common.data.text_files import known_encoding
    from common.errors import ConfigError

    try:
        known = None if encoding is None else known_encoding(encoding)
    except ValueError as error:
        raise ConfigError([f"--encoding {error} (got {encoding})"]) from error
    return FileFormat(known, decimal)  # type: ignore[arg-type]  # one of the option's choices


def print_told(value: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """A verb's result on stdout: for a program, or for a person."""
    print(json.dumps(value, indent=2) if as_json else "\n".join(lines))
