"""The points of a sweep: a federation document with some of its values set otherwise."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.document import documents, mistakes
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import ConfigError

Key = tuple[str, ...]  # privacy, row, epsilon
UNITS: tuple[Key, ...] = (("privacy", "row"), ("privacy", "client"))
EPSILON = "epsilon"
EVALUATION_NOISE: Key = ("privacy", "evaluation", "noise")
INFINITE = ("inf", ".inf")  # as an epsilon: without privacy
INFINITY = "∞"
LOG_FROM = 10.0  # a range whose ends are so far apart is searched by orders of magnitude
LONGEST_NAME = 100


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole ones, where both are."""

    low: float
    high: float

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high >= LOG_FROM * self.low


@dataclass(frozen=True)
class Axis:
    """One key of the document, and what it is set to."""

    key: Key
    values: tuple[Any, ...] | Range


@dataclass(frozen=True, kw_only=True)
class Point:
    """One choice for each axis."""

    settings: Mapping[Key, Any]
    federation: Federation  # with them

    @cached_property
    def name(self) -> str:
        """For a folder: the settings in short, and the document's fingerprint."""
        labels = labels_of(self.settings)
        text = ",".join(f"{labels[key]}={shown(value)}" for key, value in self.settings.items()) or "as-it-is"
        plain = re.sub(r"[^\w.,=+-]+", "_", text)[:LONGEST_NAME]
        return f"{plain}-{self.federation.fingerprint[:8]}"


def parse(settings: Sequence[str]) -> list[Axis]:
    """KEY=VALUE,VALUE,... or KEY=LOW..HIGH, each as it would stand in the document. Raises `ConfigError`."""
    axes: dict[Key, Axis] = {}
    for text in settings:
        name, equals, values = text.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or not all(key) or not values.strip():
            raise ConfigError([f"--grid {text}: expected KEY=VALUE,VALUE,..., as training.learning_rate=0.1,0.3"])
        if key in axes:
            raise ConfigError([f"--grid {name}: stands twice; give all its values at once"])
        if key == ("training", "seed"):
            raise ConfigError(["--grid training.seed: give --seeds, so that runs that differ by it alone are averaged"])
        axes[key] = Axis(key, _values(text, values))
    return [*axes.values()]


PRESETS = ("rate", "batch", "regularisation", "clip")
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # times what the document has


def preset(name: str, federation: Federation) -> list[str]:
    """What `--grid` is given to look around a document's own value. Raises `ConfigError` if it has none."""
    training, row, whole = federation.training, federation.privacy.row, federation.privacy.client
    if name == "rate":
        return [f"training.learning_rate={_listed(training.learning_rate * by for by in AROUND)}"]
    if name == "batch":
        return [f"training.batch_size={_listed(sorted({max(1, round(training.batch_size * by)) for by in AROUND}))}"]
    if name == "regularisation":
        return ["training.weight_decay=0,1e-4,1e-3,1e-2", "model.dropout=0,0.2"]
    units = [(part, unit) for part, unit in (("row", row), ("client", whole)) if unit is not None]
    if not units:
        raise ConfigError(["--preset clip: the document has no privacy.row or privacy.client, and so no clip"])
    return [f"privacy.{part}.clip={_listed(unit.clip * by for by in AROUND)}" for part, unit in units]


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:.6g}" for value in values)


def _values(text: str, values: str) -> tuple[Any, ...] | Range:
    low, dots, high = values.partition("..")
    try:
        if dots:
            ends = [documents.plain_value(end) for end in (low, high)]
            if not all(isinstance(end, int | float) for end in ends) or not ends[0] < ends[1]:
                raise ConfigError([f"--grid {text}: expected LOW..HIGH, two numbers of which the second is larger"])
            return Range(*ends)
        found = documents.plain_value(f"[{values}]")
    except ValueError as error:
        raise ConfigError([f"--grid {text}: {error}"]) from error
    return tuple({json.dumps(value, sort_keys=True): value for value in found}.values())


def grid(document: Path, axes: Sequence[Axis]) -> list[Point]:
    """All combinations, in the order of the axes. Raises `ConfigError` with all that is wrong with any of them."""
    choices: list[tuple[Any, ...]] = []
    for axis in axes:
        if isinstance(axis.values, Range):
            low, high = axis.values.low, axis.values.high
            raise ConfigError(
                [f"--grid {'.'.join(axis.key)}={low}..{high}: a range is for --search; or list its values"]
            )
        choices.append(axis.values)
    points: dict[str, Point] = {}
    problems: list[str] = []
    for values in itertools.product(*choices):
        try:
            found = point(document, {axis.key: value for axis, value in zip(axes, values, strict=True)})
            points.setdefault(found.name, found)  # 1 and 1.0 are one
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return [*points.values()]


def point(document: Path, settings: Mapping[Key, Any]) -> Point:
    """The document with these settings. An infinite epsilon leaves out the privacy that it is of, and where no unit has
    any, evaluation has no noise.

    Raises:
        ConfigError: they do not fit.
    """
    off = [unit for unit in UNITS if settings.get(unit, unit) is None or is_infinite((*unit, EPSILON), settings)]
    changes: dict[mistakes.Key, Any] = {key: value for key, value in settings.items() if key[:-1] not in off}
    changes |= dict.fromkeys(off)
    changes = dict(sorted(changes.items(), key=lambda change: len(change[0])))  # a mapping before what is in it
    if off and all(unit in off or not _is_private(document, unit, settings) for unit in UNITS):
        changes.setdefault(EVALUATION_NOISE, 0.0)
    try:
        return Point(settings=settings, federation=federations.load(document, changes=changes))
    except ConfigError as error:
        where = ", ".join(f"{'.'.join(key)}={shown(value)}" for key, value in settings.items())
        raise ConfigError([f"with {where}: {problem}" if where else problem for problem in error.problems]) from error


def _is_private(document: Path, unit: Key, settings: Mapping[Key, Any]) -> bool:
    """Has the document privacy of this unit, or the settings?"""
    return any(key[: len(unit)] == unit for key in settings) or (
        getattr(federations.load(document).privacy, unit[-1]) is not None
    )


def is_infinite(key: Key, settings: Mapping[Key, Any]) -> bool:
    """Is a setting an epsilon that stands for no privacy?"""
    value = settings.get(key)
    is_epsilon = key[-1] == EPSILON and key[:-1] in UNITS
    return is_epsilon and (value in INFINITE or (isinstance(value, float) and math.isinf(value)))


def labels_of(keys: Iterable[Key]) -> dict[Key, str]:
    """As short as they can be told apart by: of training.learning_rate the last part, if no other key ends so."""
    every = list(keys)

    def label(key: Key) -> str:
        for length in range(1, len(key) + 1):
            if sum(other[-length:] == key[-length:] for other in every) == 1:
                return ".".join(key[-length:])
        return ".".join(key)

    return {key: label(key) for key in every}


def told(key: Key, settings: Mapping[Key, Any]) -> str:
    """A setting, for people."""
    return INFINITY if is_infinite(key, settings) else shown(settings.get(key))


def shown(value: Any) -> str:
    """A setting as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
