"""`cloister join`: a client process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.verbs import LogFormatOption, QuietOption, app, verb


@app.command()
@verb
def join(
    client: Annotated[Path, typer.Argument(metavar="CLIENT.YAML", help="The client file.")],
    wait: Annotated[float, typer.Option(help="Seconds the server may be away before giving up.")] = 300.0,
    strict: Annotated[bool, typer.Option(help="First check the table against the file's `federation`.")] = False,
    log_format: LogFormatOption = "text",
    quiet: QuietOption = False,
) -> None:
    """Take part in a federation with one table: a client process.

    Example: `cloister join simulations/heart/cleveland.yaml`
    """
    import logging
    import sys
    from contextlib import nullcontext

    from client.join import join as take_part
    from client.settings import load_client_file
    from cloister.check import check_table
    from cloister.terminal import JoinDisplay, ask, progress_console, tell
    from common.logs import json_handler, log_to, quiet_flower, text_handler

    as_json = log_format == "json"
    console = progress_console(quiet)

    def say(text: str) -> None:
        logging.getLogger("cloister.client").info(text) if as_json else tell(console, text)

    settings = load_client_file(client)
    if strict:
        for line in check_table(settings, client):
            say(line)
    quiet_flower()
    log_to(json_handler() if as_json else text_handler())
    display = JoinDisplay(console) if console.is_terminal and not as_json and not quiet else None
    with display or nullcontext():
        code = take_part(
            settings,
            client,
            wait_s=wait,
            say=say,
            ask=ask if sys.stdin.isatty() else None,
            step=display,
            interrupted=display.close if display else lambda: None,
        )
    raise typer.Exit(code)
