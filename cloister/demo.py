"""`cloister demo`: four hospitals, each a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister.verbs import app, verb


@app.command()
@verb
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its files.")] = Path("cloister-demo"),
) -> None:
    """Four hospitals train one model with differential privacy: a real server and four real clients, here.

    Example: `cloister demo`
    """
    from cloister.closing import print_result
    from cloister.progress import ProgressDisplay
    from cloister.report import after_run
    from cloister.terminal import progress_console
    from common.document import federation as federations
    from simulations import HEART
    from simulations.demo import HOSPITALS, new_folder, run_demo

    console = progress_console(quiet=False)
    place = new_folder(folder)
    console.print(f"one server, four hospitals, each a process of its own; all files in {place}", highlight=False)
    limits = federations.load(HEART / "federation.yaml").privacy.limits
    with ProgressDisplay(console, limits=limits) as display:
        result, run = run_demo(place, observe=display)
    print_result(result, run)
    for line in after_run(run):
        print(line)
    table = place / HOSPITALS[0] / f"{HOSPITALS[0]}.data"
    called = sys.argv[0] if Path(sys.argv[0]).name == "cloister" else "cloister"  # as it can be called again
    print(f"predict with the model: {called} predict {run} {table} -o predictions.csv")
