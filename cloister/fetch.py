"""`cloister fetch`: a client asks for the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.verbs import app, verb


@app.command()
@verb
def fetch(
    client: Annotated[Path, typer.Argument(metavar="CLIENT.YAML", help="The client file.")],
) -> None:
    """Ask the server for the model after the last complete round, and keep it beside the client's ledger.

    Example: `cloister fetch simulations/heart/cleveland.yaml`

    For a client that was away when the run ended, while the server is there: `cloister serve --resume RUN_DIR --stay`.
    """
    from client.fetch import fetch as fetch_model
    from client.settings import load_client_file

    model, path = fetch_model(load_client_file(client), client)
    print(f"the model of {model.federation.name} after round {model.round} is kept: {path}")
