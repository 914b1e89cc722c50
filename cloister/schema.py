"""`cloister schema`: help with the schema of a federation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister.verbs import DecimalOption, EncodingOption, app, file_format, verb

schema_app = typer.Typer(help="Work on the schema of a federation.", no_args_is_help=True)
app.add_typer(schema_app, name="schema")


@schema_app.command("draft")
@verb
def schema_draft(
    table: Annotated[Path, typer.Argument(metavar="DATA.CSV", help="A table with a header.")],
    target: Annotated[str | None, typer.Option(help="The column to predict [default: the last usable].")] = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
) -> None:
    """Write a first schema from a table, for a human to edit. It shows what was read from the data.

    Example: `cloister schema draft flats/tables/site-1.csv --target demand`
    """
    from common.data.drafting import draft

    text = draft(table, target=target, form=file_format(encoding, decimal))
    print("warning: bounds and categories were read from the data and are not private", file=sys.stderr)
    print(text, end="")
