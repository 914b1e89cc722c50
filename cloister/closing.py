"""How a run ended, for whoever ran it: a table, or JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloister.progress import NO_ROWS, scaled
from cloister.report import after_run
from cloister.terminal import tell
from common.model.energy import Energy
from common.model.gaps import HEADLINES, size_of
from common.text import duration

MOST_ROWS = 10  # of clients in the table; of more, it tells the least, the median and the largest


def finish(result: dict[str, Any], folder: Path, *, no_report: bool = False, as_json: bool = False) -> None:
    """Shows how a run ended, and ends the process as it did."""
    show_end(result, folder, no_report=no_report, as_json=as_json)
    leave(result)


def show_end(result: dict[str, Any], folder: Path, *, no_report: bool, as_json: bool = False) -> None:
    """Shows the closing table, or prints what result.json holds and where it is, and writes the run's report."""
    if as_json:
        print(json.dumps({**result, "run_folder": str(folder)}, indent=2), flush=True)
    else:
        print_result(result, folder)
    for line in () if no_report else after_run(folder):
        tell(Console(stderr=as_json or line.startswith("warning: ")), line)


def leave(result: dict[str, Any]) -> None:
    """A run that was interrupted exits as interrupted programs do."""
    if result["status"] == "stopped":
        raise typer.Exit(143 if result["reason"].startswith("terminated") else 130)


def print_result(result: dict[str, Any], folder: Path) -> None:
    """Shows how a run ended, on stdout."""
    console = Console()
    console.print(f"{result['status'].replace('_', ' ')} after {result['rounds']} rounds", highlight=False)
    console.print(_summary(result))
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)


def _summary(result: dict[str, Any]) -> Table:
    """The closing table of a run, from what result.json holds."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    noisy = " (from noisy counts)" if any(result["privacy"].values()) else ""
    for name, value in _figures(result["evaluation"] or {}):
        table.add_row(name + noisy, value)
    if result["evaluation"] == {}:
        table.add_row("evaluation", NO_ROWS)
    for target, told in (result["evaluation"] or {}).get("tasks", {}).items():
        for name, value in _figures(told)[:1] or [("too few rows" if noisy else "no row has it", "")]:
            table.add_row(f"{escape(target)}: {name}{noisy if value else ''}", value)
    for name, value in _gaps(result["evaluation"] or {}):
        table.add_row(name, value)
    for name, value in _held_out(result["held_out"] or {}):
        table.add_row(name, value)
    if (row := result["privacy"]["row"]) is not None:
        for name, epsilon in _epsilons(row["per_client"]):
            table.add_row(name, f"{epsilon:.2f}")
        if row["epsilon"] is not None:
            table.add_row("epsilon of a row, at most (whole plan)", f"{row['epsilon']:.2f}")
        table.add_row("delta", f"{row['delta']:g}")
    if (unit := result["privacy"]["client"]) is not None:
        table.add_row("epsilon of a whole client", f"{unit['epsilon']:.2f}")
        table.add_row("delta of a client", f"{unit['delta']:g}")
    if (energy := result.get("energy")) is not None:
        table.add_row("energy of clients", str(Energy.of(energy)))
    table.add_row("clients", str(len(result["clients"])))
    for name, value in _refused(result["refused"]):
        table.add_row(name, value)
    table.add_row("time", duration(result["seconds"]))
    if result["reason"]:
        table.add_row("reason", escape(result["reason"]))
    return table


def _gaps(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """How far groups are apart, where the schema declares any: in accuracy or error, and the largest in recall."""
    found = []
    for column, compared in metrics.get("by", {}).items():
        gaps = compared["gaps"]
        recalls = sorted((name for name in gaps if name.startswith("recall")), key=lambda name: -gaps[name]["gap"])
        named = [name for name in (*HEADLINES, *recalls[:1]) if name in gaps]
        for name in named:
            gap = gaps[name]
            noise = f" ± {size_of(name, gap['noise'])} of noise" if "noise" in gap else ""
            said = f"{size_of(name, gap['gap'])}{noise}, worst {escape(str(gap['worst']))}"
            found.append((f"gap in {'MAE' if name == 'mae' else escape(name)} by {escape(column)}", said))
        if not named:
            found.append((f"gap by {escape(column)}", "too few rows to tell"))
    return found


def _epsilons(per_client: dict[str, float]) -> list[tuple[str, float]]:
    """What rows have paid: of each client, or of many in short."""
    if len(per_client) <= MOST_ROWS:
        return [(f"epsilon of {escape(client)}", epsilon) for client, epsilon in per_client.items()]
    found = sorted(per_client.values())
    figures = {"least": found[0], "median": median(found), "largest": found[-1]}
    return [(f"epsilon of {len(found)} clients, {name}", epsilon) for name, epsilon in figures.items()]


def _refused(kinds: dict[str, str]) -> list[tuple[str, str]]:
    if len(kinds) <= MOST_ROWS:
        return [(f"refused by {escape(client)}", kind.replace("_", " ")) for client, kind in kinds.items()]
    counts = Counter(kinds.values())
    return [(f"refused by clients: {kind.replace('_', ' ')}", str(number)) for kind, number in counts.most_common()]


def _held_out(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The first figure of the held-out rows; below it that of each client, where all of them were there to score."""
    how = "exact, but against clamped targets" if metrics.get("clamped_targets") else "exact"
    rows = [(f"{name} on held-out rows ({how})", value) for name, value in _figures(metrics)[:1]]
    each = metrics.get("per_client", {})
    if len(each) <= MOST_ROWS:
        return rows + [(f"  {escape(client)}", value) for client, own in each.items() for _, value in _figures(own)[:1]]
    name = "accuracy" if "accuracy" in metrics else "mae"
    found = sorted(own[name] for own in each.values() if name in own)
    figures = {"least": found[0], "median": median(found), "largest": found[-1]} if found else {}
    of = f"  of {len(found)} clients"
    return rows + [(f"{of}, {which}", _figures({name: value})[0][1]) for which, value in figures.items()]


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "accuracy": "accuracy",
        "precision": "precision, macro",
        "recall": "recall, macro",
        "f1": "F1, macro",
    }
    if "accuracy" in metrics:
        return [(shown, f"{100 * metrics[name]:.1f} %") for name, shown in names.items() if name in metrics]
    shown = []
    for name in ("mae", "rmse", "mse"):
        if name in metrics:
            value = f"{metrics[name]:.4g}{scaled(metrics, 'mae') if name == 'mae' else ''}"
            # A sum of noisy squares that came out below zero says nothing; a model without any error is no likely one.
            shown.append((name.upper(), value if metrics[name] else "lost in the noise"))
    return shown
