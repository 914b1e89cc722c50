"""Events as lines, and how a run stands after them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model.energy import Energy
from server.rounds.events import (
    Ended,
    Event,
    Refused,
    Rejected,
    Resumed,
    RoundEnded,
    Serving,
    Standing,
    Started,
    State,
    Waiting,
    after,
    from_json,
)

NAMES = st.text(max_size=9)
SECONDS = st.floats(0, 1e6)
COUNTS = st.integers(0, 10**9)
METRICS = st.none() | st.dictionaries(NAMES, st.floats(0, 1) | st.dictionaries(NAMES, st.floats(0, 1)), max_size=3)
EVENTS = st.one_of(
    st.builds(Serving, time=SECONDS, address=NAMES),
    st.builds(Started, time=SECONDS, run=NAMES, federation=NAMES, rounds=COUNTS),
    st.builds(Resumed, time=SECONDS, round=COUNTS, run=NAMES, federation=NAMES, rounds=COUNTS),
    st.builds(Waiting, time=SECONDS, clients=COUNTS, min_clients=COUNTS),
    st.builds(Refused, time=SECONDS, client=NAMES, kind=NAMES, reason=NAMES),
    st.builds(Ended, time=SECONDS, status=st.sampled_from(["completed", "stopped"]), reason=NAMES),
    st.builds(
        RoundEnded,
        time=SECONDS,
        round=COUNTS,
        rounds=COUNTS,
        waiting=SECONDS,
        clients=COUNTS,
        asked=COUNTS,
        loss=st.none() | SECONDS,
        rejected=st.lists(st.builds(Rejected, NAMES, NAMES, NAMES), max_size=3).map(tuple),
        strikes=st.dictionaries(NAMES, COUNTS, max_size=3),
        seconds=SECONDS,
        evaluation=METRICS,
        held_out=METRICS,
        privacy=st.dictionaries(NAMES, st.dictionaries(NAMES, SECONDS, max_size=2), max_size=2),
        failed=NAMES,
        advice=NAMES,
    ),
)


@given(EVENTS)
def test_an_event_comes_back_from_its_line(event):
    assert from_json(json.loads(json.dumps(event.to_json()))) == event


def test_a_rounds_line_is_what_readers_know():
    event = RoundEnded(round=7, rounds=9, waiting=0.5, clients=2, asked=3, loss=0.25, seconds=1.5, time=12.0)
    assert json.dumps(event.to_json()) == (
        '{"event": "round", "round": 7, "rounds": 9, "waiting": 0.5, "clients": 2, "asked": 3, '
        '"train": {"loss": 0.25}, "rejected": [], "seconds": 1.5, "time": 12.0}'
    )


@pytest.mark.parametrize("line", [{}, {"event": "party"}, {"event": "waiting", "clients": 1}, {"event": "end", "x": 1}])
def test_a_line_that_is_no_event_is_an_error(line):
    with pytest.raises((LookupError, TypeError, ValueError)):
        from_json(line)


# How a run stands


def stands(*events: Event, so_far: Standing | None = None) -> Standing:
    standing = so_far or Standing()
    for event in events:
        standing = after(standing, event)
    return standing


def ended(number: int, **changes: Any) -> RoundEnded:
    return RoundEnded(round=number, rounds=9, clients=2, **changes)


def test_a_run_starts_waits_runs_and_ends():
    start, waits = Started(rounds=9), Waiting(clients=1, min_clients=2)
    assert Standing().state == State.STARTING
    assert (stands(start).state, stands(start).rounds) == (State.RUNNING, 9)
    assert (stands(start, waits).state, stands(start, waits).waiting) == (State.WAITING, waits)
    assert (stands(start, waits, ended(1)).state, stands(start, waits, ended(1)).waiting) == (State.RUNNING, None)
    over = stands(start, ended(1), Ended(status="budget_exhausted", reason="spent"))
    assert (over.state, over.reason, over.round) == (State.BUDGET_EXHAUSTED, "spent", 1)
    again = stands(Resumed(round=1, rounds=12), so_far=over)
    assert (again.state, again.reason, again.round, again.rounds) == (State.RUNNING, "", 1, 12)


def test_a_failed_round_leaves_all_but_its_problem_as_it_was():
    good = ended(1, evaluation={"accuracy": 0.5}, held_out={"accuracy": 0.25}, privacy={"row": {"epsilon": 1.0}})
    standing = stands(good, ended(2, failed="no quorum", privacy={"row": {"epsilon": 1.5}}))
    assert (standing.round, standing.problem, standing.failures) == (1, "no quorum", 1)
    assert (standing.evaluation, standing.held_out) == ({"accuracy": 0.5}, {"accuracy": 0.25})
    assert standing.privacy == {"row": {"epsilon": 1.5}}  # what was released was
    assert stands(ended(3), so_far=standing).problem == ""


def test_an_evaluation_that_counted_nothing_hides_none_that_did():
    assert stands(ended(1)).evaluation is None
    assert stands(ended(1, evaluation={})).evaluation == {}
    assert stands(ended(1, evaluation={"mae": 1.0}), ended(2, evaluation={}), ended(3)).evaluation == {"mae": 1.0}


def test_strikes_are_the_rounds_and_reasons_stay():
    late = Rejected("ben", "late", "slow")
    standing = stands(ended(1, rejected=(late,), strikes={"ben": 1}), ended(2))
    assert (standing.strikes, standing.reasons) == ({}, {"ben": "slow"})


def test_who_refused_at_the_door_or_in_a_round_is_known_by_kind():
    spent = Rejected("ben", "budget_exhausted", "spent")
    standing = stands(Refused(client="ada", kind="refused", reason="policy"), ended(1, rejected=(spent,)))
    assert standing.refused == {"ada": "refused", "ben": "budget_exhausted"}
    assert standing.reasons == {"ada": "policy", "ben": "spent"}


def test_energy_is_summed_over_rounds_and_failed_ones_took_some_too():
    took = {"joules": 2.0, "grams": 0.5}
    assert stands(ended(1)).energy is None
    standing = stands(ended(1, energy=took), ended(2, failed="no quorum", energy=took), ended(3))
    assert standing.energy == Energy(joules=4.0, grams=1.0)


def test_an_event_without_energy_is_written_as_before_there_was_any():
    assert "energy" not in ended(1).to_json()
    told = ended(1, energy={"joules": 2.0, "grams": 0.5})
    assert from_json(told.to_json()) == told


def test_every_figure_of_a_standing_comes_from_some_event():
    late, spent = Rejected("ben", "late", "slow"), Rejected("cyd", "budget_exhausted", "spent")
    told: dict[str, Any] = {"evaluation": {"accuracy": 0.5}, "held_out": {"accuracy": 0.5}}
    told |= {"privacy": {"row": {"epsilon": 1.0}}, "energy": {"joules": 2.0, "grams": 0.5}}
    standing = stands(
        Started(rounds=9),
        ended(1, rejected=(late, spent), strikes={"ben": 1}, **told),
        ended(2, failed="no quorum", strikes={"ben": 2}),
        Ended(status="failed", reason="no quorum"),
        Waiting(clients=0, min_clients=2),
    )
    untouched = Standing()
    assert [f.name for f in fields(Standing) if getattr(standing, f.name) == getattr(untouched, f.name)] == []


def test_a_round_that_is_told_again_after_a_restart_took_its_energy_once():
    ended = RoundEnded(round=1, rounds=3, energy={"joules": 2.0, "grams": 0.5})
    failed = RoundEnded(round=2, rounds=3, energy={"joules": 1.0, "grams": 0.25}, failed="nobody answered")
    standing = Standing()
    for event in (ended, Resumed(round=1, rounds=3), ended, failed, failed):
        standing = after(standing, event)
    assert standing.energy == Energy(joules=4.0, grams=1.0)
