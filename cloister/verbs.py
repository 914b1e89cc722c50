"""What the verbs share: the application that they are added to, their common options, and how their errors end."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Choice, Context, HelpFormatter
from typer.core import TyperCommand

if TYPE_CHECKING:
    from common.data.tables import FileFormat

EXAMPLE = "Example: "

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
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


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cloister {version('cloister')}")
        raise typer.Exit


@app.callback()
def cloister(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Federated learning for data that may not be shared: the data owner holds the privacy budget."""


class Verb(TyperCommand):
    """A command whose help ends with its example, on a line of its own, which is pasted whole however wide the terminal
    is."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        super().format_help(ctx, formatter)
        assert self.callback is not None
        print(f" Example:\n\n   {split_example(self.callback)[1]}\n")


def split_example(callback: Callable[..., Any]) -> tuple[str, str]:
    """What a verb's docstring says, and its example: the paragraph that begins with the word."""
    paragraphs = (inspect.getdoc(callback) or "").split("\n\n")
    examples = [text for text in paragraphs if text.startswith(EXAMPLE)]
    assert len(examples) == 1, f"{callback.__name__}: its docstring must have one example"
    said = "\n\n".join(text for text in paragraphs if text not in examples)
    return said, " ".join(examples[0].removeprefix(EXAMPLE).split()).strip("`")


def put_examples_last(commands: typer.Typer) -> None:
    """Has the help of each verb end with its example."""
    for command in commands.registered_commands:
        assert command.callback is not None
        command.help, command.cls = split_example(command.callback)[0], Verb
    for group in commands.registered_groups:
        assert group.typer_instance is not None
        put_examples_last(group.typer_instance)


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
