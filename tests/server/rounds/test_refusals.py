"""Clients that refuse to join: told once each, by their public kind, and part of how a run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from common.document.federation import Federation
from common.errors import RunFailed
from common.wire.records import BUDGET_EXHAUSTED, FAILED, REFUSED
from server.app import execute
from server.folder.folder import RunFolder, read_run
from server.rounds.admission import Rejection
from server.rounds.disclosure import NOT_TOLD
from server.rounds.events import Event, Refused, State
from simulations.inline import InlineGrid
from tests.server import fakes
from tests.server.fakes import Answer, Clients
from tests.support import WHOLE, federation

SAID = {BUDGET_EXHAUSTED: "the budget does not cover this run", REFUSED: "policy", FAILED: "no data"}


class Door(InlineGrid):
    """Some nodes refuse to join; others are there, or come when `later` says so."""

    def __init__(self, refusing: dict[int, int], here: tuple[int, ...] = (), later: Callable[[], bool] = bool) -> None:
        super().__init__(Clients(), (*here, *refusing), run="run")  # type: ignore[arg-type]
        self._refusing, self._here, self._later = refusing, list(here), later

    def get_node_ids(self) -> list[int]:
        return [*self._here, *(self._refusing if self._later() else ())]

    def refusals(self) -> list[Rejection]:
        return [] if self._later() else [Rejection(n, code, SAID[code]) for n, code in self._refusing.items()]


def run(folder: Path, grid: Door, fed: Federation | None = None, **settings: Any) -> tuple[dict[str, Any], list[Event]]:
    told: list[Event] = []
    place = RunFolder.create(fed or federation(training__rounds=2), path=folder)
    document = fed or federation(training__rounds=2)
    settings = {"wait_s": 0.0, "name_of": "client-{}".format, **settings}
    result = execute(document, grid, place, name="run", observe=told.append, **settings)
    return result, told


def test_when_nobody_may_join_for_want_of_budget_the_run_ends_as_that(tmp_path):
    result, told = run(tmp_path / "run", Door({1: BUDGET_EXHAUSTED, 2: BUDGET_EXHAUSTED}))
    assert (result["status"], result["rounds"]) == ("budget_exhausted", 0)
    assert result["reason"].endswith("because budgets are spent: client-1, client-2")
    assert result["refused"] == {"client-1": "budget_exhausted", "client-2": "budget_exhausted"}
    assert [(e.client, e.kind, e.reason) for e in told if isinstance(e, Refused)] == [
        (f"client-{n}", "budget_exhausted", "the budget does not cover this run") for n in (1, 2)
    ]
    standing = read_run(tmp_path / "run").standing
    assert (standing.state, standing.refused) == (State.BUDGET_EXHAUSTED, result["refused"])


def test_other_refusals_are_named_where_a_run_fails_for_want_of_clients(tmp_path):
    grid = Door({1: REFUSED, 2: BUDGET_EXHAUSTED, 3: FAILED})
    said = (
        "of the 2 clients that a round needs are there; client-1: refused, client-2: budget_exhausted, client-3: failed"
    )
    with pytest.raises(RunFailed, match=said):
        run(tmp_path / "run", grid)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "failed" and said in result["reason"]
    assert result["refused"] == {"client-1": "refused", "client-2": "budget_exhausted", "client-3": "failed"}


def test_while_others_may_come_a_refusal_ends_nothing(tmp_path):
    looks = iter(range(10**9))
    result, told = run(
        tmp_path / "run", Door({1: BUDGET_EXHAUSTED, 2: BUDGET_EXHAUSTED}, later=lambda: next(looks) > 50), wait_s=60
    )
    # Each is told once, and both have thought better of it.
    assert [e.client for e in told if isinstance(e, Refused)] == ["client-1", "client-2"]
    assert (result["status"], result["clients"]) == ("completed", ["client-1", "client-2"])


def test_who_has_taken_part_and_comes_back_without_budget_ends_a_run_that_cannot_go_on_without(tmp_path):
    class Leaving(Door):
        gone = False

        def get_node_ids(self) -> list[int]:
            return [1] if self.gone else [1, 2]

        def refusals(self) -> list[Rejection]:
            return [Rejection(2, BUDGET_EXHAUSTED, "spent")] if self.gone else []

    grid = Leaving({}, here=(1, 2))
    fed = federation(training__rounds=3)
    place = RunFolder.create(fed, path=tmp_path / "run")

    def observe(event: Event) -> None:
        grid.gone = grid.gone or event.KIND == "round"

    result = execute(fed, grid, place, name="run", observe=observe, name_of=str, wait_s=None)
    assert (result["status"], result["rounds"]) == ("budget_exhausted", 1)
    assert result["reason"].endswith("because budgets are spent: 2")


def test_a_reason_that_could_tell_when_a_client_was_asked_is_withheld_at_the_door_too(tmp_path):
    fed = federation(**WHOLE, strategy__fraction=0.5)
    _, told = run(tmp_path / "run", Door({1: BUDGET_EXHAUSTED, 2: BUDGET_EXHAUSTED}), fed)
    assert {e.reason for e in told if isinstance(e, Refused)} == {NOT_TOLD}


def test_a_refusal_that_comes_in_the_last_round_is_told_before_the_end(tmp_path):
    class Late(Door):
        def refusals(self) -> list[Rejection]:
            return [Rejection(3, REFUSED, "policy")] if trained else []

    def train(message: Message) -> Answer:
        trained.append(message)
        return fakes.train(message)

    trained: list[Message] = []
    grid = Late({}, here=(1, 2))
    grid._app = Clients({1: train})  # type: ignore[assignment]
    result, told = run(tmp_path / "run", grid, federation(training__rounds=1))
    assert (result["status"], result["refused"]) == ("completed", {"client-3": "refused"})
    assert [event.KIND for event in told] == ["start", "round", "refused", "end"]
