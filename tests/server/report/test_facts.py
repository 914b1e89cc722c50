"""What a run comes to: the figures and sentences of its page and card."""

from __future__ import annotations

import numpy as np
import pytest

from common.model.scores import scores_of
from server.report import facts
from server.rounds.events import Ended, RoundEnded, Started
from tests.server.report.runs import completed, rounds, written
from tests.support import PRIVATE, WHOLE, federation

NUMBER = {"schema__target": {"name": "y", "bounds": [100, 300]}, "training__loss": "mse"}
THREE = {"schema__target": {"name": "y", "classes": ["a", "b", "c"]}}


@pytest.mark.parametrize(
    "changes, counts, figure",
    [
        ({}, [450.0, 50.0, 100.0, 400.0], "accuracy"),
        (THREE, [300.0, 20, 30, 40, 250, 10, 60, 20, 270], "accuracy"),
        (NUMBER, [1000.0, 150.0, 40.0], "mae"),
        (NUMBER, [1000.0, 900.0, 850.0], "mae"),
        ({"schema__group": {"name": "c", "groups": ["red"]}}, [450.0, 50, 100, 400, 20, 30, 40, 10], "accuracy"),
    ],
)
def test_the_band_is_as_wide_as_noise_in_the_counts_makes_it(changes, counts, figure):
    document, rng, s = federation(**changes), np.random.default_rng(0), 8.0
    exact = np.array(counts)
    found = [
        scores_of(exact + rng.normal(scale=s, size=len(exact)), document.data_schema)[figure] for _ in range(20_000)
    ]
    scores = scores_of(exact, document.data_schema) | {"count_noise": s}
    deviation = facts.noise_of(scores, document)
    # 20,000 draws give a deviation to 0.5 %; that noise is drawn and not differentiated moves it by less than 2 %.
    assert deviation == pytest.approx(np.std(found), rel=0.03)
    score = facts.score_of(scores, document)
    assert score is not None and score.low is not None and score.high is not None
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * deviation, rel=1e-3)
    assert facts.noise_of(scores_of(exact, document.data_schema), document) is None


def test_a_band_stays_where_the_figure_can_be():
    scores = scores_of(np.array([9.0, 0, 0, 9.0]), federation().data_schema) | {"count_noise": 5.0}
    score = facts.score_of(scores, federation())
    assert score is not None and (score.low, score.high) == (pytest.approx(1 - 1.96 * 5 / 18 * 2**0.5, abs=1e-3), 1.0)


def test_who_refused_or_was_late_is_told_by_client_and_kind(tmp_path):
    told = facts.refusals(completed(tmp_path / "run"))
    assert told == [
        {"client": "cyd", "kind": "late", "rounds": 1, "reason": "no reply within 30 s"},
        {"client": "dan", "kind": "refused", "rounds": 0, "reason": "policy.delta: asked 0.001, allowed 0.0001"},
    ]


def test_participants_are_those_whose_replies_counted(tmp_path):
    assert facts.participants(completed(tmp_path / "run")) == ["ada", "ben"]


def test_a_round_that_was_told_twice_counts_once_and_a_failed_one_not_at_all(tmp_path):
    document = federation()
    first, second, third = rounds(document)
    events = [first, second, RoundEnded(round=2, rounds=3, failed="no"), second, third]
    assert [event.round for event in facts.complete(written(tmp_path / "run", document, events))] == [1, 2, 3]


def test_what_each_unit_has_paid_and_may_pay(tmp_path):
    (row,) = facts.epsilons(completed(tmp_path / "run"))
    assert row == {"unit": "row", "epsilon": 3.0, "spent": 1.5, "limit": 4.0, "delta": 1e-3}
    assert facts.epsilons(completed(tmp_path / "plain", changes={})) == []
    begun = written(tmp_path / "begun", federation(**WHOLE), [])
    assert facts.epsilons(begun) == [{"unit": "client", "epsilon": None, "spent": None, "limit": 4.0, "delta": 0.01}]


@pytest.mark.parametrize(
    "events, said",
    [
        ([], "It has not begun."),
        ([Started(rounds=3)], "It goes on, after 0 of 3 rounds."),
        (
            [Started(rounds=3), Ended(status="failed", reason="2 rounds failed")],
            "It failed after 0 of 3 rounds: 2 rounds failed.",
        ),
        (
            [Started(rounds=3), Ended(status="stopped", reason="interrupted")],
            "It was stopped after 0 of 3 rounds: interrupted.",
        ),
        ([Started(rounds=3), *rounds(federation()), Ended(status="completed")], "It completed 3 of 3 rounds."),
    ],
)
def test_how_a_run_stands_is_a_sentence(tmp_path, events, said):
    assert facts.ended(written(tmp_path / "run", federation(), events)) == said


def test_what_a_model_is_for_is_a_sentence():
    assert facts.task(federation()) == "Predicts y (0, 1) from 3 columns (2 numbers, 1 category)."
    assert (
        facts.task(federation(**NUMBER))
        == "Predicts y (a number from 100 to 300) from 3 columns (2 numbers, 1 category)."
    )
    many = federation(schema__target={"name": "y", "classes": [f"c{i}" for i in range(9)]})
    assert facts.task(many).startswith("Predicts y (9 classes)")


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).normal(size=11).tolist()
    assert facts.quantiles(values) == pytest.approx(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    assert facts.quantiles([2.0]) == [2.0] * 5


def test_a_private_run_without_an_evaluation_has_no_score():
    assert facts.score_of(None, federation(**PRIVATE)) is None
    assert facts.score_of({}, federation(**PRIVATE)) is None
