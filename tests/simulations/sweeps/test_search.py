"""The search comes near what is best, and one that is started again goes on with what was proposed before."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError
from simulations.sweeps.outcomes import Outcome, Result
from simulations.sweeps.points import parse
from simulations.sweeps.search import Search
from tests.support import document

SPACE = ["training.learning_rate=1e-4..10", "training.local_steps=1..9", "model.activation=relu,tanh"]


def search(folder: Path, number: int, *, space: list[str] = SPACE, seed: int = 1) -> Search:
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(document()))
    return Search(
        path,
        parse(space),
        number=number,
        metric="accuracy",
        lower_is_better=False,
        seed=seed,
        record=folder / "search.jsonl",
    )


def goodness(settings: dict[tuple[str, ...], object]) -> float:
    """Best, and 1, at 0.1, 5 and tanh."""
    rate, steps = settings["training", "learning_rate"], settings["training", "local_steps"]
    assert isinstance(rate, float) and isinstance(steps, int)
    off = abs(math.log10(rate) + 1) / 5 + abs(steps - 5) / 8 + (settings["model", "activation"] != "tanh") / 4
    return 1 - off / 3


def go(searching: Search) -> list[dict[tuple[str, ...], object]]:
    tried = []
    for point in searching.points():
        tried.append(dict(point.settings))
        assert point.federation.training.learning_rate == point.settings["training", "learning_rate"]
        outcome = Outcome(metrics={"accuracy": goodness(tried[-1])})
        searching.tell(Result(point=point, outcomes={0: outcome}))
    return tried


def test_it_comes_near_the_best(tmp_path):
    tried = go(search(tmp_path, 60))
    assert all(1e-4 <= settings["training", "learning_rate"] <= 10 for settings in tried)  # type: ignore[operator]
    assert len({repr(settings) for settings in tried}) == len(tried) <= 60
    later = [goodness(settings) for settings in tried[40:]]
    earlier = [goodness(settings) for settings in tried[:10]]
    assert max(later) > 0.93 and sum(later) / len(later) > sum(earlier) / len(earlier) + 0.1


def test_one_that_is_started_again_begins_with_what_was_proposed(tmp_path):
    first = go(search(tmp_path, 6))
    again = go(search(tmp_path, 9))
    assert again[:6] == first and len({repr(settings) for settings in again}) == 9
    other = go(search(tmp_path, 2, space=[*SPACE[:2], "model.activation=tanh,sigmoid"]))
    assert len(other) == 2 and other != first[:2]  # another space, nothing of which is known


def test_a_point_without_a_model_for_every_seed_is_passed_over(tmp_path):
    searching = search(tmp_path, 3)
    for point in searching.points():
        good, bad = Outcome(metrics={"accuracy": 1.0}), Outcome(error="no")
        searching.tell(Result(point=point, outcomes={0: good, 1: bad}))
    assert {trial.state.name for trial in searching._study.trials} == {"FAIL"}


def test_a_point_that_is_proposed_again_is_told_what_is_known(tmp_path):
    searching = search(tmp_path, 12, space=["model.activation=relu,tanh"])
    assert len(go_of_activation(searching)) == 2
    assert [trial.state.name for trial in searching._study.trials] == ["COMPLETE"] * 12


def go_of_activation(searching: Search) -> list[object]:
    tried = []
    for point in searching.points():
        tried.append(point.settings["model", "activation"])
        searching.tell(Result(point=point, outcomes={0: Outcome(metrics={"accuracy": float(tried[-1] == "tanh")})}))
    return tried


def test_a_proposal_that_does_not_fit_is_passed_over_and_told(tmp_path):
    searching = search(tmp_path, 12, space=["training.momentum=0,0.5", "training.nesterov=false,true"])
    found = [dict(point.settings) for point in searching.points()]
    assert 0 < len(found) < 4 and {"training", "nesterov"} != set(found[0])
    assert any("nesterov" in line for line in searching.refused)


def test_what_it_needs_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="what it is to search"):
        search(tmp_path, 3, space=[])
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        search(tmp_path, 3, space=["training.lerning_rate=0.1..1"])
    with pytest.raises(ConfigError, match="must be greater than 0"):
        search(tmp_path, 3, space=["training.learning_rate=0..1"])
    assert not (tmp_path / "search.jsonl").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cloister\[search\]'"):
        search(tmp_path, 3)
