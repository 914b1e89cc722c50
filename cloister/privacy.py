"""`cloister privacy`: a run's privacy.json, in words for the person who answers for the data.

Each client's epsilon is recomputed here, from what it says it released, by Opacus (where that can be imported).
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.verbs import app, verb
from common.errors import RunFolderError
from common.privacy.statement import Statement

if TYPE_CHECKING:
    from common.privacy.second_opinion import Opinion

WIDTH = 100


@app.command()
@verb
def privacy(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
) -> None:
    """What a run has revealed about whom, in words. The figures are those of its privacy.json.

    Example: `cloister privacy runs/heart`
    """
    for line in lines(folder):
        print(line)


def read(folder: Path) -> dict[str, Any]:
    """The statement in a run folder. Raises `RunFolderError` if there is none, or it is damaged."""
    path = folder / "privacy.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}; is this a run folder?") from error
    except ValueError as error:
        raise RunFolderError(f"{path}: not a privacy statement, or damaged") from error
    if not isinstance(value, dict) or not {"run", "federation", "row", "client", "software"} <= set(value):
        raise RunFolderError(f"{path}: not a privacy statement, or damaged")
    return value


def lines(folder: Path) -> list[str]:
    """A run's statement for a reader. Every figure is in privacy.json, from which it can be recomputed.

    Raises:
        RunFolderError: there is no statement, or it is damaged.
    """
    statement = read(folder)
    try:
        return _explained(statement)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{folder / 'privacy.json'}: not a privacy statement, or damaged") from error


def _explained(statement: dict[str, Any]) -> list[str]:
    from server.folder.start import in_words

    out = [f"Run {statement['run']} of federation {statement['federation']}", ""]
    if start := statement.get("start"):
        out += [*textwrap.wrap(in_words(start), WIDTH), ""]
    row, client = statement["row"], statement["client"]
    if row is None and client is None:
        return [*out, "No differential privacy: the updates that left are exact, and can reveal rows."]
    if row is not None:
        out += _unit("Each row", row)
        out += _wrapped(f"The whole model: {row['whole_model']}.")
        for name, told in row["per_client"].items():
            one = Statement.described(told)
            out += ["", f"  {name}: epsilon {one.epsilon:.2f} at delta {one.delta:g}"]
            if one.planned_epsilon > one.epsilon + 0.005:
                out.append(f"    - at most {one.planned_epsilon:.2f}: with all that was planned, used or not")
            out += [*_released(told), f"    - noise: {told['noise']}", *_arithmetic(told), *_second_opinion(one)]
        if "withheld" in row:
            out += _wrapped(f"Each client's figures are withheld: {row['withheld']}.")
        out.append("")
    else:
        out += ["Each row: no protection of its own; clients send exact updates to the server.", ""]
    if client is not None:
        out += _unit("Each client as a whole", client)
        out += _wrapped(f"Noise: {client['noise']}, drawn by the server.")
        out += _released(client)
    else:
        out.append("Each client as a whole: not protected. What all its rows have in common can show in the model.")
    software = ", ".join(f"{name} {number}" for name, number in statement["software"].items())
    return [*out, "", *_wrapped(f"Software: {software}.")]


def _unit(title: str, unit: dict[str, Any]) -> list[str]:
    out = [f"{title}: epsilon {_figure(unit['epsilon'])} at delta {unit['delta']:g}"]
    if unit["epsilon"] is not None:
        out += _wrapped(
            f"Whether {unit['unit']} was used or not changes the probability of anything that the adversary sees by at "
            f"most a factor e^{unit['epsilon']:.2f} = {_power(unit['epsilon'])}, but for a probability of "
            f"{unit['delta']:g}."
        )
    for key in ("unit", "neighbours", "adversary", "accountant", "composition"):
        out += _wrapped(f"{key.capitalize()}: {unit[key]}.")
    out.append("  Not covered:")
    for line in unit["not_covered"]:
        out += textwrap.wrap(f"- {line}", WIDTH, initial_indent="    ", subsequent_indent="      ")
    return out


def _arithmetic(client: dict[str, Any]) -> list[str]:
    said = client.get("arithmetic", "not stated")
    return textwrap.wrap(f"- arithmetic: {said}", WIDTH, initial_indent="    ", subsequent_indent="      ")


def _second_opinion(client: Statement) -> list[str]:
    """What Opacus says of the plan, told by the client, and of what was released, computed here."""
    out = []
    if (planned := client.opacus_planned_epsilon) is not None:
        accountant = "PRV" if client.opacus_prv else "RDP"
        out.append(f"    - Opacus ({accountant}), told by the client: {planned:.2f} for the whole plan")
    if (recomputed := _by_opacus(client)) is None:
        return [*out, "    - Opacus is not installed here, so nothing was recomputed"]
    return [
        *out,
        f"    - Opacus ({recomputed.accountant}), recomputed here: at most {recomputed.high:.2f} for what was released",
    ]


def _by_opacus(client: Statement) -> Opinion | None:
    """What Opacus says the client's releases cost, as they compose; None where it is not installed."""
    from common.privacy.second_opinion import opinion, together

    updates = (client.noise_multiplier, client.sampling_rate, int(client.steps))
    counts = (client.evaluation_noise, 1.0, int(client.evaluations))
    try:
        of_updates, of_counts = (opinion((each,) if each[2] else (), client.delta) for each in (updates, counts))
    except ImportError:
        return None
    return together(client.count_epsilon, of_updates, of_counts)


def _released(unit: dict[str, Any]) -> list[str]:
    out = []
    for release in unit["released"]:
        out += textwrap.wrap(f"- {_release(release)}", WIDTH, initial_indent="    ", subsequent_indent="      ")
    return out


def _release(release: dict[str, Any]) -> str:
    what = release["what"]
    if release["mechanism"] != "Gaussian":
        return f"{what}: {release['told']:g}, {release['mechanism']} noise, epsilon {release['epsilon']:g}"
    return (
        f"{what}: {release['steps']:g} times, Gaussian noise with multiplier {release['noise_multiplier']:.3f}; "
        f"{release['sampler']} sampling at rate {release['sampling_rate']:.3g}"
    )


def _power(epsilon: float) -> str:
    return f"{math.exp(epsilon):.3g}" if epsilon < 700 else "more than 10^304"


def _figure(epsilon: float | None) -> str:
    return "0 (nothing was released)" if epsilon is None else f"{epsilon:.2f}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
