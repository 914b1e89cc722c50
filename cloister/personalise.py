"""`cloister personalise`: a data owner's own version of a finished model, and whether joining was worth it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.models import TargetOption
from cloister.verbs import JSONOption, app, verb

if TYPE_CHECKING:
    from client.personal import Compared, Made

WHAT = {
    "federation": "the federation's, as it came",
    "head": "its last layer trained further",
    "personal": "trained further as a whole, pulled back",
    "alone": "trained on your rows only",
}


@app.command()
@verb
def personalise(
    client: Annotated[Path, typer.Argument(metavar="CLIENT.YAML", help="The client file.")],
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="A run folder or model file [default: the newest kept].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where the best of your own goes [default: beside the ledger].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
    target: TargetOption = None,
    as_json: JSONOption = False,
) -> None:
    """Fit a finished model to your own rows, and see whether joining was worth it. Nothing leaves, so it costs nothing.

    Example: `cloister personalise simulations/heart/cleveland.yaml runs/heart`
    """
    import json

    from rich.console import Console

    from client import kept
    from client.personal import own_rows, personalise, saved_as, verdict
    from client.settings import load_client_file
    from cloister import models
    from common.errors import ConfigError
    from common.files import OWN, write_out
    from common.inference.saved import to_bytes

    settings = load_client_file(client)
    given = models.load(model or client, target)
    if out is None and target is not None:
        raise ConfigError(["--target: say with -o where the model goes: the one that is kept is the first target's"])
    if out is not None:
        models.check_out(out, force=force)
    compared = personalise(given, own_rows(settings, given.federation))
    best = saved_as(compared.best, given)
    if out is None:
        place = kept.keep(settings.personal, best, mode=OWN)
    else:
        write_out(out, to_bytes(best), mode=OWN)
        place = out
    if as_json:
        print(json.dumps({**told(compared), "verdict": verdict(compared), "kept": str(place)}, indent=2))
        return
    console = Console()
    console.print(_table(compared), highlight=False)
    for line in (
        verdict(compared),
        f"of your own, {compared.best.kind} did best in cross-validation; it is kept: {place}",
        "it was trained on your rows without noise: do not give it away",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def told(compared: Compared) -> dict[str, Any]:
    """All of it, as JSON values."""
    return {
        "rows": compared.rows,
        "validation_rows": compared.validation_rows,
        "best": compared.best.kind,
        "models": {
            kind: {
                "steps": made.way.steps,
                "rate": made.way.rate,
                "pull": made.way.pull,
                "cross_validation": {"missed": made.missed[0], "loss": made.missed[1]},
                "interval": made.interval,
                **made.scores,
            }
            for kind, made in compared.models.items()
        },
    }


def _table(compared: Compared) -> Any:
    from rich.table import Table

    number = "mae" in compared.models["federation"].scores
    table = Table(
        title=f"{compared.validation_rows:,} validation rows of yours, {compared.rows:,} others to train on",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("model")
    for heading in ("mean absolute error" if number else "accuracy", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("how")
    for made in compared.models.values():
        table.add_row(made.kind, *_figures(made), _how(made))
    return table


def _figures(made: Made) -> tuple[str, str]:
    low, high = made.interval
    if "accuracy" in made.scores:
        return f"{100 * made.scores['accuracy']:.1f} %", f"{100 * low:.0f} to {100 * high:.0f} %"
    return f"{made.scores['mae']:.4g}", f"{low:.4g} to {high:.4g}"


def _how(made: Made) -> str:
    way = made.way
    if made.kind == "federation":
        return WHAT[made.kind]
    if not way.steps:
        return f"{WHAT['federation']}: more training made it worse"
    pull = f" by {way.pull:g}" if way.pull else ""
    return f"{WHAT[made.kind]}{pull}, {way.steps} steps at {way.rate:g}"
