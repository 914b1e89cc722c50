"""What a sweep leaves for people and for other programs: a table, two CSV files and a picture."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import files
from common.document.federation import LOWER_IS_BETTER, OF_CLASSES
from common.errors import RunFolderError
from simulations.sweeps.outcomes import Result
from simulations.sweeps.points import Key, is_infinite, labels_of, shown, told

RESULTS, RUNS, TABLE, PICTURE = "results.csv", "runs.csv", "results.md", "results.svg"
MOST_LINES = 10  # that a legend tells apart


class Report:
    """The results of a sweep, in the order of its points."""

    def __init__(self, results: Sequence[Result], *, metric: str) -> None:
        self.results, self.metric = results, metric
        self.keys = [key for key in _keys(results) if len({repr(r.point.settings.get(key)) for r in results}) > 1]
        self.labels = labels_of(self.keys)

    @property
    def metrics(self) -> list[str]:
        """Those that any run has, the chosen one first."""
        found = {name for result in self.results for outcome in result.complete for name in outcome.metrics}
        rest = [name for name in (*OF_CLASSES, *LOWER_IS_BETTER) if name in found and name != self.metric]
        return [self.metric, *rest]

    @property
    def main(self) -> list[str]:
        """Those that a person is shown; the files have all."""
        return [name for name in self.metrics if name in (self.metric, "f1", *LOWER_IS_BETTER)]

    @property
    def best(self) -> Result | None:
        """Of the points all of whose seeds have a model, if there are any: one that fails for most is not the best."""
        known = [result for result in self.results if result.mean(self.metric) is not None]
        known = [result for result in known if result.is_whole] or known
        choose = min if self.metric in LOWER_IS_BETTER else max
        return choose(known, key=lambda result: result.mean(self.metric) or 0.0) if known else None

    @property
    def units(self) -> list[str]:
        """Of privacy, that any run spent something of."""
        found = {unit for result in self.results for outcome in result.complete for unit in outcome.epsilon}
        return [unit for unit in ("row", "client") if unit in found]

    # For people

    def head(self) -> list[str]:
        spent = [f"{unit} epsilon" for unit in self.units]
        return [*(self.labels[key] for key in self.keys), *self.main, *spent, "runs"]

    def rows(self) -> Iterator[list[str]]:
        """A point each, as `head` has it."""
        for result in self.results:
            runs = str(len(result.complete)) + ("" if result.is_whole else f" of {len(result.outcomes)}")
            spent = [_most(result, unit) for unit in self.units]
            yield [
                *(told(key, result.point.settings) for key in self.keys),
                *(figure(metric, result.mean(metric), result.deviation(metric)) for metric in self.main),
                *("-" if epsilon is None else f"{epsilon:.2f}" for epsilon in spent),
                runs,
            ]

    def errors(self) -> list[str]:
        """Why runs have no model, each reason once."""
        reasons: dict[str, str] = {}
        for result in self.results:
            for seed, outcome in sorted(result.outcomes.items()):
                if outcome.error:
                    reasons.setdefault(outcome.error, f"{result.point.name}, seed {seed}: {outcome.error}")
        return [*reasons.values()]

    # For programs

    def write(self, folder: Path) -> list[Path]:
        """Writes the files, and returns where. The picture needs matplotlib. Raises `RunFolderError`."""
        table = "\n".join(markdown(self.head(), [*self.rows()])) + "\n"
        written = {TABLE: table.encode(), RESULTS: _csv(self._result_rows()), RUNS: _csv(self._run_rows())}
        if self.keys and importlib.util.find_spec("matplotlib") is not None:
            written[PICTURE] = self.picture()
        try:
            for name, data in written.items():
                files.replace(folder / name, data)
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be written: {error.strerror}") from error
        return [folder / name for name in written]

    def _result_rows(self) -> Iterator[Mapping[str, Any]]:
        for result in self.results:
            complete = result.complete
            yield (
                _settings(result)
                | {"runs": len(complete), "failed": len(result.outcomes) - len(complete)}
                | {
                    f"{metric}_{what}": value
                    for metric in self.metrics
                    for what, value in (("mean", result.mean(metric)), ("deviation", result.deviation(metric)))
                }
                | {f"epsilon_{unit}": _most(result, unit) for unit in self.units}
            )

    def _run_rows(self) -> Iterator[Mapping[str, Any]]:
        for result in self.results:
            for seed, outcome in sorted(result.outcomes.items()):
                yield (
                    _settings(result)
                    | {"seed": seed}
                    | {metric: outcome.metrics.get(metric) for metric in self.metrics}
                    | {f"epsilon_{unit}": outcome.epsilon.get(unit) for unit in self.units}
                    | {"rounds": outcome.rounds, "clients": outcome.clients, "seconds": outcome.seconds}
                    | {"error": outcome.error}
                )

    def picture(self) -> bytes:
        """The chosen metric over one key's values, a line for each choice of the others; bars are one deviation."""
        import matplotlib

        matplotlib.use("svg")
        matplotlib.rcParams |= {"svg.hashsalt": "cloister", "svg.fonttype": "none", "font.family": "sans-serif"}
        from matplotlib import pyplot
        from matplotlib.ticker import PercentFormatter

        across = self._across()
        values: list[Any] = list({repr(v): v for v in (r.point.settings.get(across) for r in self.results)}.values())
        if all(isinstance(value, int | float) or is_infinite(across, {across: value}) for value in values):
            values.sort(key=lambda value: float(value))
        lines: dict[str, list[Result]] = {}
        for result in self.results:
            others = (f"{self.labels[k]} {told(k, result.point.settings)}" for k in self.keys if k != across)
            lines.setdefault(", ".join(others), []).append(result)
        figure, axis = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        places = {repr(value): place for place, value in enumerate(values)}
        for number, (name, results) in enumerate(lines.items()):
            known = sorted(
                (places[repr(r.point.settings.get(across))], mean, r.deviation(self.metric) or 0.0)
                for r in results
                if (mean := r.mean(self.metric)) is not None
            )
            if known:
                at, means, deviations = zip(*known, strict=True)
                aside = 0.04 * (number - (len(lines) - 1) / 2)  # so that bars do not hide bars
                moved = [place + aside for place in at]
                axis.errorbar(moved, means, yerr=deviations, marker="o", markersize=4, capsize=3, label=name)
        axis.set_xticks(range(len(values)), [told(across, {across: value}) for value in values])
        axis.set_xlabel(".".join(across))
        most = max(len(result.outcomes) for result in self.results)
        axis.set_ylabel(self.metric + (f", mean of {most} seeds" if most > 1 else ""))
        if self.metric in OF_CLASSES:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
        if 1 < len(lines) <= MOST_LINES:
            axis.legend(frameon=False)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        return data.getvalue()

    def _across(self) -> Key:
        """The key whose values are most like an axis: an epsilon, else the one with most numbers."""

        def like_an_axis(key: Key) -> tuple[bool, int]:
            values = {repr(v): v for v in (result.point.settings.get(key) for result in self.results)}.values()
            return key[-1] == "epsilon", sum(isinstance(value, int | float) for value in values)

        return max(self.keys, key=like_an_axis)


def figure(metric: str, mean: float | None, deviation: float | None) -> str:
    """A metric's mean and deviation, for people: shares in percent."""
    if mean is None:
        return "-"
    scale, form = (100.0, ".1f") if metric in OF_CLASSES else (1.0, ".4g")
    text = f"{scale * mean:{form}}" + (f" ± {scale * deviation:{form}}" if deviation is not None else "")
    return f"{text} %" if metric in OF_CLASSES else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, as lines."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def gained(own: Sequence[float], base: Sequence[float], unit: str = "") -> str:
    """A figure's mean over seeds, and by how much it differs from the base's, seed by seed, with that mean's standard
    error; of the base itself the mean alone."""
    mean = f"{statistics.fmean(own):.1f}{unit}"
    if own is base:
        return mean
    gains = [mine - other for mine, other in zip(own, base, strict=True)]
    return f"{mean} ({statistics.fmean(gains):+.1f} ± {statistics.stdev(gains) / math.sqrt(len(gains)):.1f})"


def _keys(results: Sequence[Result]) -> list[Key]:
    return list(dict.fromkeys(key for result in results for key in result.point.settings))


def _settings(result: Result) -> dict[str, Any]:
    return {
        ".".join(key): "inf" if is_infinite(key, result.point.settings) else shown(value)
        for key, value in result.point.settings.items()
    }


def _most(result: Result, unit: str) -> float | None:
    return max((outcome.epsilon[unit] for outcome in result.complete if unit in outcome.epsilon), default=None)


def _csv(rows: Iterator[Mapping[str, Any]]) -> bytes:
    every = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in every for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(every)
    return text.getvalue().encode()
