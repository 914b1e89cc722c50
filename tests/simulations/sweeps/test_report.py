"""Means and deviations, the files and the picture, of results that are made up."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from simulations.sweeps.outcomes import Outcome, Result
from simulations.sweeps.points import grid, parse
from simulations.sweeps.report import Report, markdown
from tests.support import PRIVATE, document

VALUES = [[0.5, 0.6, 0.7], [0.8, 0.9, 0.85], [0.4, 0.4, 0.4], [0.6, 0.7, 0.2]]


@pytest.fixture
def results(tmp_path) -> list[Result]:
    """Two epsilons by two learning rates, of three seeds; one run has failed."""
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    texts = ["privacy.row.epsilon=inf,8", "training.learning_rate=0.1,0.5", "model.hidden=[5]"]
    points = grid(tmp_path / "federation.yaml", parse(texts))
    found = []
    for i, (point, values) in enumerate(zip(points, VALUES, strict=True)):
        spent = {"row": 7.9 + 0.01 * i} if i >= 2 else {}
        outcomes = {
            seed: Outcome(metrics={"accuracy": v, "f1": v / 2, "recall": v / 3}, epsilon=spent, rounds=3, clients=4)
            for seed, v in enumerate(values)
        }
        if i == 3:
            outcomes[1] = Outcome(error="no budget")
        found.append(Result(point=point, outcomes=outcomes))
    return found


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_have_every_figure(tmp_path, results):
    report = Report(results, metric="accuracy")
    written = report.write(tmp_path)
    assert [path.name for path in written] == ["results.md", "results.csv", "runs.csv", "results.svg"]
    rows = read(written[1])
    for row, values in zip(rows[:3], VALUES[:3], strict=True):
        assert float(row["accuracy_mean"]) == pytest.approx(np.mean(values))
        assert float(row["accuracy_deviation"]) == pytest.approx(np.std(values, ddof=1))
        assert float(row["recall_mean"]) == pytest.approx(np.mean(values) / 3)
        assert (row["runs"], row["failed"]) == ("3", "0")
    assert [row["privacy.row.epsilon"] for row in rows] == ["inf", "inf", "8", "8"]
    assert rows[3]["runs"] == "2" and rows[3]["failed"] == "1"
    assert float(rows[3]["accuracy_mean"]) == pytest.approx(0.4)
    assert rows[0]["epsilon_row"] == "" and float(rows[2]["epsilon_row"]) == pytest.approx(7.92)
    runs = read(written[2])
    found = [float(run["accuracy"]) for run in runs if not run["error"]]
    assert found == [*VALUES[0], *VALUES[1], *VALUES[2], VALUES[3][0], VALUES[3][2]]
    assert [run["error"] for run in runs].count("no budget") == 1


def test_a_person_sees_what_differs_and_the_chosen_metric(results):
    report = Report(results, metric="accuracy")
    assert report.head() == ["epsilon", "learning_rate", "accuracy", "f1", "row epsilon", "runs"]
    rows = [*report.rows()]
    assert rows[0] == ["∞", "0.1", "60.0 ± 10.0 %", "30.0 ± 5.0 %", "-", "3"]
    assert rows[3] == ["8", "0.5", "40.0 ± 28.3 %", "20.0 ± 14.1 %", "7.93", "2 of 3"]
    assert report.best is results[1]
    lucky = Result(
        point=results[0].point, outcomes={0: Outcome(metrics={"accuracy": 1.0}), 1: Outcome(error="diverged")}
    )
    assert Report([*results, lucky], metric="accuracy").best is results[1]
    assert [line.partition(": ")[2] for line in report.errors()] == ["no budget"]
    lines = [*markdown(report.head(), rows)]
    assert lines[0].startswith("| epsilon | learning_rate |") and lines[1] == "|" + "---|" * 6 and len(lines) == 6


def test_the_picture_has_a_line_for_each_choice_over_epsilon(results):
    picture = Report(results, metric="accuracy").picture().decode()
    for text in ("privacy.row.epsilon", "learning_rate 0.1", "learning_rate 0.5", "∞", "accuracy, mean of 3 seeds"):
        assert f">{text}<" in picture
    assert Report(results, metric="accuracy").picture().decode() == picture  # equal results, equal files


def test_lower_is_better_for_errors(results):
    errors = [
        Result(point=result.point, outcomes={0: Outcome(metrics={"mae": value})})
        for result, value in zip(results, [3, 1, 2, 4], strict=True)
    ]
    report = Report(errors, metric="mae")
    assert report.best is errors[1]
    assert next(report.rows())[2] == "3"
