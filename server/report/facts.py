"""What a run comes to, in figures and in sentences: for the page, the model card and comparisons alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from common.document.federation import Federation
from common.document.schema import Categorical, Classes, NumericTarget
from common.errors import RunFolderError
from common.model.energy import Energy, sum_of
from common.model.gaps import FEW_ROWS, in_words, size_of
from common.model.scores import RECALL, Scores, are_enough, noise_of_figure
from server.folder.folder import RunFolder, RunRecord
from server.rounds.events import RoundEnded, State

Z = 1.959964  # of a 95 % interval
EXACT = "held-out rows, exact"


@dataclass(frozen=True)
class Score:
    """The figure that says most about a model. `low` and `high` are what noise makes uncertain; None without noise."""

    name: str  # accuracy or mae
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return shown(self.name, self.value)

    @property
    def band(self) -> str:
        """What noise makes uncertain, in words; "" without noise."""
        if self.low is None or self.high is None:
            return ""
        return f"between {shown(self.name, self.low)} and {shown(self.name, self.high)}, by the noise in its counts"


def shown(name: str, value: float) -> str:
    """A figure for a person: shares in percent, errors in the target's units."""
    return f"{value:.4g}" if name in ("mae", "mse", "rmse") else f"{100 * value:.1f} %"


def label(name: str) -> str:
    """What a figure is called."""
    named = {"mae": "mean absolute error", "rmse": "root mean squared error", "f1": "F1, macro"}
    return named.get(name, f"{name}, macro" if name in ("precision", "recall") else name)


def held_out(record: RunRecord) -> Scores | None:
    """The last scores on rows that were held out: those of result.json, which may have been added after the run."""
    return record.result.get("held_out") or record.standing.held_out


def last_scores(record: RunRecord) -> list[tuple[str, Scores]]:
    """The last evaluations, the exact one first, each with whose rows it is of."""
    noisy = ", by noisy counts" if record.federation.privacy.limits else ""
    found = [
        (EXACT, held_out(record)),
        (f"the clients' validation rows{noisy}", record.standing.evaluation),
    ]
    return [(who, scores) for who, scores in found if scores]


def score_of(scores: Scores | None, federation: Federation) -> Score | None:
    """The figure of an evaluation; None if there was none, or no row was counted."""
    name = federation.metrics[0]
    if not scores or name not in scores:
        return None
    value, deviation = float(scores[name]), noise_of(scores, federation)
    if deviation is None:
        return Score(name, value)
    return Score(name, value, *interval(name, value, deviation))


def interval(name: str, value: float, deviation: float) -> tuple[float, float]:
    """The 95 % interval of accuracy or mae by its standard deviation."""
    highest = 1.0 if name == "accuracy" else math.inf
    return max(value - Z * deviation, 0.0), min(value + Z * deviation, highest)


def other_targets(scores: Scores, federation: Federation) -> list[tuple[str, str, str, str, str]]:
    """Of each target but the first: its name, what its figure is, that, what noise makes uncertain, and how many rows
    have it."""
    found, schema = [], federation.data_schema
    noise = float(scores.get("count_noise", 0.0)) * math.sqrt(len(schema.groups))
    for task in schema.tasks[1:]:
        told = scores.get("tasks", {}).get(task.target.name, {"rows": 0.0})
        figure = "accuracy" if isinstance(task.target, Classes) else "mae"
        if figure not in told:
            found.append((task.target.name, label(figure), "too few rows" if noise else "no row has it", "", "0"))
            continue
        value, deviation = told[figure], noise_of_figure(figure, told[figure], told["rows"], task, noise)
        ends = " to ".join(shown(figure, end) for end in interval(figure, value, deviation)) if deviation else ""
        found.append((task.target.name, label(figure), shown(figure, value), ends, f"{told['rows']:,.0f}"))
    return found


def groups(scores: Scores, federation: Federation) -> list[tuple[str, str, str, dict[str, str], str]]:
    """Of each declared group: its name, about how many rows, its accuracy or error with what noise alone makes of it,
    the recall of each class, and by how much the model is too sure of itself, or off to one side."""
    schema, found = federation.data_schema, []
    if schema.group is None or not scores.get("by"):
        return []
    name, noise = federation.metrics[0], float(scores.get("count_noise", 0.0))
    few = 0 if federation.privacy.client is not None else FEW_ROWS
    for group, told in scores["by"][schema.group.name]["groups"].items():
        said = "none"
        if name in told and noise and not are_enough(name, told["rows"], schema, noise=noise, few=few):
            said = "too few rows"
        elif name in told:
            deviation = noise_of_figure(name, told[name], told["rows"], schema, noise)
            said = shown(name, told[name]) + (f" ± {shown(name, Z * deviation)}" if deviation else "")
        recalls = {
            label: f"{100 * value:.1f} %"
            for label, value in told.get("recall", {}).items()
            if not noise or are_enough(f"{RECALL}{label}", told["rows_of_class"][label], schema, noise=noise, few=few)
        }
        calibration = next((size_of(f, told[f]) for f in ("overconfidence", "bias") if f in told), "")
        if said == "too few rows":
            calibration = ""
        found.append((group, f"{told['rows']:,.0f}", said, recalls, calibration))
    return found


def gaps_by_group(scores: Scores) -> list[str]:
    """The gaps between groups, each a sentence; that there are none to speak of, if so."""
    found = []
    for column, compared in scores.get("by", {}).items():
        said = [sentence(in_words(figure, gap, between=f"by {column}")) for figure, gap in compared["gaps"].items()]
        noisy = "count_noise" in scores
        enough = "enough rows for their noise" if noisy else f"{FEW_ROWS} rows"
        found += said or [f"No gaps by {column}: fewer than two groups have {enough}"]
    return found


def gaps_by_client(scores: Scores) -> list[str]:
    """The gaps between clients, each a sentence."""
    gaps = scores.get("gaps_between_clients", {})
    return [sentence(in_words(figure, gap, between="between clients")) for figure, gap in gaps.items()]


def sentence(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def noise_of(scores: Scores, federation: Federation) -> float | None:
    """Standard deviation that the counts' noise gives to accuracy or mae; None where there is none."""
    name, schema = federation.metrics[0], federation.data_schema
    # Each count is a sum over the groups that the schema declares.
    noise = float(scores.get("count_noise", 0.0)) * math.sqrt(len(schema.groups))
    return noise_of_figure(name, float(scores[name]), float(scores.get("rows", 0.0)), schema, noise) or None


def told(record: RunRecord) -> list[RoundEnded]:
    """All rounds, failed ones among them. After a restart one may have been told twice: the last word counts."""
    return list({(event.round, bool(event.failed)): event for event in record.rounds}.values())


def complete(record: RunRecord) -> list[RoundEnded]:
    """The rounds that moved the model."""
    return [event for event in told(record) if not event.failed]


def hides_replies(record: RunRecord) -> bool:
    """Are members of a round those that were there, and counts of rows those of clients as if each had one?"""
    return record.federation.privacy.client is not None


def task(federation: Federation) -> str:
    """What the model is for, in a sentence."""
    schema = federation.data_schema
    categories = sum(isinstance(feature, Categorical) for feature in schema.features)
    numbers = len(schema.features) - categories
    kinds = [_counted(numbers, "number", "numbers")] if numbers else []
    kinds += [_counted(categories, "category", "categories")] if categories else []
    columns = f"{_counted(len(schema.features), 'column', 'columns')} ({', '.join(kinds)})"
    return f"Predicts {'; '.join(map(_named, schema.targets))} from {columns}."


def _named(target: Classes | NumericTarget) -> str:
    if isinstance(target, Classes):
        classes = list(target.classes)
        return f"{target.name} ({', '.join(classes) if len(classes) <= 6 else f'{len(classes)} classes'})"
    low, high = target.bounds
    return f"{target.name} (a number from {low:g} to {high:g})"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def ended(record: RunRecord, *, why: bool = True) -> str:
    """How the run stands or ended, in a sentence; with `why`, also the reason."""
    standing = record.standing
    done = f"{standing.round} of {standing.rounds or record.federation.training.rounds} rounds"
    said = {
        State.STARTING: "It has not begun",
        State.WAITING: f"It waits for clients, after {done}",
        State.RUNNING: f"It goes on, after {done}",
        State.COMPLETED: f"It completed {done}",
        State.BUDGET_EXHAUSTED: f"It ended after {done}, because privacy budgets are spent",
        State.STOPPED: f"It was stopped after {done}",
        State.FAILED: f"It failed after {done}",
    }[standing.state]
    return f"{said}{': ' + standing.reason if why and standing.reason else ''}."


def participants(record: RunRecord) -> list[str]:
    """Who took part in any round, by name; of more than events name, those of result.json."""
    named = {name for event in record.rounds for name in event.members}
    return sorted(named | set(record.result.get("clients", ())))


def refusals(record: RunRecord) -> list[dict[str, Any]]:
    """Who said no, or whose replies did not count: by client and kind, how often, and the last reason."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for said in record.refused:
        found[said.client, said.kind] = {"rounds": 0, "reason": said.reason}
    for event in told(record):
        for rejected in event.rejected:
            one = found.setdefault((rejected.client, rejected.kind), {"rounds": 0, "reason": ""})
            one["rounds"] += 1
            one["reason"] = rejected.reason
    return [
        {"client": client, "kind": kind.replace("_", " "), **told}
        for (client, kind), told in sorted(found.items(), key=lambda item: (-item[1]["rounds"], item[0]))
    ]


def epsilons(record: RunRecord) -> list[dict[str, Any]]:
    """What each protected unit has paid and may pay: row, client, or both."""
    federation, found = record.federation, []
    for unit, settings in (("row", federation.privacy.row), ("client", federation.privacy.client)):
        if settings is None:
            continue
        told = record.privacy.get(unit) or {}
        last = next((e.privacy[unit]["epsilon"] for e in reversed(record.rounds) if unit in e.privacy), None)
        found.append(
            {
                "unit": unit,
                "epsilon": told.get("epsilon") if told.get("epsilon") is not None else last,
                "spent": last,
                "limit": settings.epsilon,
                "delta": settings.delta,
            }
        )
    return found


def energy(record: RunRecord) -> tuple[Energy, str] | None:
    """What clients' tasks took, and in words what that is for a round and for a percentage point of accuracy; None
    where they did not tell."""
    rounds = [Energy.of(event.energy) for event in told(record) if event.energy]
    if (total := sum_of(*rounds)) is None:
        return None
    said = f"{total.part(1 / len(rounds))} a round"
    point = total.per_point(held_out(record) or record.standing.evaluation)
    return total, said if point is None else f"{said}; {point} a point of accuracy"


def per_client(record: RunRecord) -> dict[str, dict[str, Any]]:
    """What each client stated of its rows' privacy, by name (privacy.json)."""
    row = record.privacy.get("row")
    return dict(row.get("per_client", {})) if isinstance(row, Mapping) else {}


@contextmanager
def readable(*records: RunRecord | RunFolder) -> Iterator[None]:
    """Around whatever draws runs: a file that is JSON, but holds something else, is a damaged one."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        named = ", ".join(str(record.path) for record in records)
        raise RunFolderError(f"{named}: a file of this run is damaged: it holds no {error}") from error


def began(record: RunRecord) -> str:
    """When the run began, in UTC; "" if it never did."""
    return datetime.fromtimestamp(record.started, UTC).strftime("%Y-%m-%d %H:%M UTC") if record.started else ""


def quantiles(values: list[float]) -> list[float]:
    """Least, lower quartile, median, upper quartile and largest of some figures."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return [at(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
