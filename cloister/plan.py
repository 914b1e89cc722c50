"""`cloister plan`: what a federation would cost, before anything runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloister.verbs import FederationFile, JSONOption, app, print_told, verb


@app.command()
@verb
def plan(
    federation: FederationFile,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")],
    epsilon: Annotated[float | None, typer.Option(help="Instead of the federation's own, for each row.")] = None,
    as_json: JSONOption = False,
) -> None:
    """What a federation would cost each row of a table, and the noise it needs, before anything runs.

    Example: `cloister plan simulations/heart/federation.yaml --rows 199`
    """
    from common.privacy import forecast as forecasts

    told = forecasts.forecast(forecasts.load(federation, epsilon=epsilon), rows)
    print_told(told, lines(told), as_json=as_json)


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
