"""Search: points proposed one after another, each in the light of those before it, by Optuna (tree-structured Parzen
estimators; Bergstra et al. 2011)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ConfigError
from simulations.sweeps.outcomes import Result
from simulations.sweeps.points import Axis, Key, Point, Range, point

if TYPE_CHECKING:
    from optuna.trial import Trial


class Search:
    """So many points, of which the later ones are where the earlier ones were best."""

    def __init__(
        self,
        document: Path,
        axes: Sequence[Axis],
        *,
        number: int,
        metric: str,
        lower_is_better: bool,
        seed: int,
        record: Path,
    ) -> None:
        """`record` is a file with what was proposed before: a search that is started again begins with that.

        Raises:
            ConfigError: Optuna is not installed, there is nothing to search, or the ends of what is do not fit.
        """
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(["--search needs Optuna: pip install 'cloister[search]'"])
        if not axes:
            raise ConfigError(["--search needs --grid KEY=LOW..HIGH, or KEY=VALUE,VALUE: what it is to search"])
        for end in (0, -1):
            point(document, {axis.key: _end(axis, end) for axis in axes})
        import optuna

        self._document, self._axes, self._number, self._metric = document, axes, number, metric
        self._record, self._space = record, json.dumps([[axis.key, str(axis.values)] for axis in axes])
        self._before = self._proposed_before()
        # With what was proposed before, the sampler goes on where it was; with its seed again it would begin again.
        seed = int(np.random.SeedSequence([seed, len(self._before)]).generate_state(1)[0])
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # some are asked for before others are told
        self._study = optuna.create_study(sampler=sampler, direction="minimize" if lower_is_better else "maximize")
        self._trials: dict[str, list[Trial]] = {}  # by the point's name; the same point may be proposed again
        self._values: dict[str, float | None] = {}  # of the points that are told
        self.refused: list[str] = []  # why proposals do not fit

    def points(self) -> Iterator[Point]:
        """Each when it is asked for; a point that was proposed before is not proposed again, and counts."""
        for parameters in self._before:
            self._study.enqueue_trial(parameters)
        if not self._before:
            self._record.write_text(self._space + "\n")
        for number in range(self._number):
            trial = self._study.ask()
            settings = {axis.key: _choose(trial, axis) for axis in self._axes}
            if number >= len(self._before):
                self._note(trial.params)
            if (proposed := self._point(trial, settings)) is None:
                continue
            known = proposed.name in self._trials
            self._trials.setdefault(proposed.name, []).append(trial)
            if not known:
                yield proposed
            elif proposed.name in self._values:
                self._tell(trial, self._values[proposed.name])

    def tell(self, result: Result) -> None:
        """How good a point was: by the mean over its seeds, if all of them have a model."""
        name = result.point.name
        self._values[name] = result.mean(self._metric) if result.is_whole else None
        for trial in self._trials[name]:
            self._tell(trial, self._values[name])

    def _tell(self, trial: Trial, value: float | None) -> None:
        import optuna

        if value is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, value)

    def _point(self, trial: Trial, settings: dict[Key, Any]) -> Point | None:
        try:
            return point(self._document, settings)
        except ConfigError as error:
            self.refused += error.problems
            self._tell(trial, None)
            return None

    def _proposed_before(self) -> list[dict[str, Any]]:
        """Of the same space; what was of another is forgotten."""
        with suppress(OSError, ValueError):
            space, *proposed = self._record.read_text().splitlines()
            if space == self._space:
                return [json.loads(line) for line in proposed]
        return []

    def _note(self, parameters: dict[str, Any]) -> None:
        with self._record.open("a") as file:
            file.write(json.dumps(parameters) + "\n")


def _end(axis: Axis, which: int) -> Any:
    if isinstance(axis.values, Range):
        return (axis.values.low, axis.values.high)[which]
    return axis.values[which]


def _choose(trial: Trial, axis: Axis) -> Any:
    name = ".".join(axis.key)
    if isinstance(axis.values, Range):
        low, high, log = axis.values.low, axis.values.high, axis.values.is_log
        if axis.values.is_whole:
            return trial.suggest_int(name, int(low), int(high), log=log)
        return float(f"{trial.suggest_float(name, low, high, log=log):.4g}")  # no more than a person would try
    return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in axis.values]))
