"""`cloister plan`: what a federation would cost, before anything runs."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.verbs import FederationFile, JSONOption, app, print_told, verb

if TYPE_CHECKING:
    from common.document.federation import Federation
    from common.privacy.suggestion import Suggestion

WIDTH = 100


@app.command()
@verb
def plan(
    federation: FederationFile,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")],
    epsilon: Annotated[float | None, typer.Option(help="Instead of the federation's own, for each row.")] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Propose settings by measured rules, and plan with them.")
    ] = False,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --suggest: how many clients [default: privacy.client.clients or strategy.min_clients]."
        ),
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """What a federation would cost each row of a table, and the noise it needs, before anything runs.

    With `--suggest`: a learning rate, a clip, a batch, rounds, steps and hidden layers to begin with, and why.

    Example: `cloister plan simulations/heart/federation.yaml --rows 199`
    """
    from common.errors import ConfigError
    from common.privacy import forecast as forecasts

    if clients is not None and not suggest:
        raise ConfigError(["--clients is for --suggest; a plan is of one client, whatever their number"])
    document = forecasts.load(federation, epsilon=epsilon)
    if suggest:
        told, shown = suggested(document, federation, rows=rows, clients=clients)
    else:
        told = forecasts.forecast(document, rows)
        shown = lines(told)
    print_told(told, shown, as_json=as_json)


def suggested(document: Federation, path: Path, *, rows: int, clients: int | None) -> tuple[dict[str, Any], list[str]]:
    """Settings for a document, and what they would cost, for a program and for a person."""
    from common.privacy.forecast import forecast
    from common.privacy.suggestion import changed, suggest

    whole = document.privacy.client
    clients = clients or (whole.clients if whole is not None else document.strategy.min_clients)
    found = suggest(document, rows=rows, clients=clients)
    planned = forecast(changed(document, found.changes), rows) if document.privacy.row is not None else None
    changes = {".".join(map(str, key)): value for key, value in found.changes.items()}
    told = {
        "suggestion": {
            "rows": rows,
            "clients": clients,
            "changes": changes,
            "reasons": list(found.reasons),
            "caveats": list(found.caveats),
            "noise_per_reach": found.noise_per_reach,
            "reach": found.reach,
            "found_on": list(found.found_on),
            "held_back": list(found.held_back),
        },
        "plan": planned,
    }
    row = document.privacy.row
    everything = {**changes, "privacy.row.epsilon": row.epsilon} if row is not None else changes
    settings = " ".join(shlex.quote(f"{key}={json.dumps(value)}") for key, value in everything.items())
    out = [f"settings to begin with, for {clients} clients of about {rows} rows each:"]
    out += reasons(found)
    out += ["", "try them on a table that you may use for that:"]
    out.append(f"  cloister sweep {shlex.quote(str(path))} --data TABLE --clients {clients} --grid {settings}")
    return told, [*out, "", "with them:", *lines(planned)] if planned is not None else out


def reasons(found: Suggestion) -> list[str]:
    """Why each setting is suggested, what was not measured, and what the rest was measured on: for a person."""
    said = []
    for reason in (*found.reasons, *(f"not measured: {caveat}" for caveat in found.caveats)):
        said += textwrap.wrap(f"- {reason}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return said + textwrap.wrap(found.measured, WIDTH)


def lines(forecast: dict[str, Any]) -> list[str]:
    """`forecast` for a person."""
    f = forecast
    out = [
        f"a table of {f['rows']} rows, about {f['training_rows']} to train on, in federation {f['federation']}:",
        f"  {f['rounds']} rounds of {f['steps']} steps, sampling rate {f['sampling_rate']:.3f}, "
        f"noise multiplier {f['noise_multiplier']:.2f}, clip {f['clip']:g}",
        f"  and {f['attempts']} spare attempts at a round, for a client that dies in one",
        f"  costs a row epsilon {f['epsilon']:.2f} at delta {f['delta']:g}: {f['of_which']['row_count']:.2f} for the "
        f"row count and {f['of_which']['updates']:.2f} for the updates",
    ]
    if f["evaluations"]["times"]:
        e = f["evaluations"]
        out.append(
            f"  or, if it is a validation row, {e['epsilon']:.2f} for {e['times']} evaluations, and {e['attempts']} "
            f"spare attempts, at noise {e['noise_multiplier']:g}"
        )
    if f["client"]:
        c = f["client"]
        out.append(
            f"  and the server protects whole clients: epsilon {c['epsilon']:g} at delta {c['delta']:g}, noise "
            f"multiplier {c['noise_multiplier']:.2f}, asked with probability {c['sampling_rate']:g}"
        )
    out += ["", f"rounds within epsilon {f['limit']:g} at a noise multiplier of"]
    out.append("  " + "  ".join(f"{r['noise_multiplier']:>8g}" for r in f["reverse"]))
    out.append("  " + "  ".join(f"{_rounds(r['rounds']):>8}" for r in f["reverse"]))
    out += ["", "noise multiplier needed (by RDP: a client finds a few percent less)"]
    out.append(
        f"  {'rounds':>8}{'batch':>8}"
        + "".join(f"{f'epsilon {e}':>14}" for e in f["alternatives"][0]["noise_multiplier"])
    )
    for a in f["alternatives"]:
        noise = "".join(f"{n:>14.2f}" for n in a["noise_multiplier"].values())
        out.append(f"  {a['rounds']:>8}{a['batch_size']:>8}{noise}")
    return [*out, "", f["warning"]] if f["warning"] else out


def _rounds(number: int) -> str:
    from common.privacy.forecast import MOST_ROUNDS

    return f">= {number:.0e}".replace("e+0", "e") if number >= MOST_ROUNDS else str(number)
