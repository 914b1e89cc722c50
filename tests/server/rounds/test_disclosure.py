"""What may be told, for the three kinds of run. Whether events, statements and status keep to it is tried where they
are made."""

from __future__ import annotations

import pytest

from common.wire.records import BUDGET_EXHAUSTED, FAILED, LATE, REFUSED
from server.rounds.admission import Rejection
from server.rounds.disclosure import NOT_TOLD, Disclosure
from server.rounds.events import Rejected
from tests.support import PRIVATE, ROOT, WHOLE, federation

OPEN = Disclosure.of(federation(**PRIVATE))
EVERYONE = Disclosure.of(federation(**WHOLE))  # all are asked, each round
SAMPLED = Disclosure.of(federation(**WHOLE, strategy__fraction=0.5))
FOUND = [Rejection(node, code, "why") for node, code in enumerate((0, FAILED, LATE, REFUSED, BUDGET_EXHAUSTED))]


@pytest.mark.parametrize("what, told", [(OPEN, [0, 1, 2, 3, 4]), (EVERYONE, [3, 4]), (SAMPLED, [3, 4])])
def test_that_a_client_refuses_is_public_and_what_became_of_its_reply_is_not(what, told):
    assert [r.node_id for r in what.rejections(FOUND)] == told


@pytest.mark.parametrize("what, reason", [(OPEN, "why"), (EVERYONE, "why"), (SAMPLED, NOT_TOLD)])
def test_a_reason_that_could_tell_when_a_client_was_asked_is_withheld(what, reason):
    named = what.named(FOUND[4], "client {}".format)
    assert named == Rejected("client 4", "budget_exhausted", reason)


@pytest.mark.parametrize("what, took_part", [(OPEN, [2]), (EVERYONE, [1, 2, 3]), (SAMPLED, [1, 2, 3])])
def test_whose_reply_counted_is_told_only_where_it_may_be(what, took_part):
    assert what.took_part([1, 2, 3], [2]) == took_part


@pytest.mark.parametrize("what, told", [(OPEN, {"transfer": 1.0}), (EVERYONE, {}), (SAMPLED, {})])
def test_what_a_rounds_seconds_went_to_is_told_only_where_replies_may_be(what, told):
    assert what.times({"transfer": 1.0}) == told


@pytest.mark.parametrize("what, kept", [(OPEN, {1: {}}), (EVERYONE, {1: {}}), (SAMPLED, {})])
def test_figures_that_grow_when_a_client_is_asked_are_not_kept_where_that_is_secret(what, kept):
    assert what.statements({1: {}}) == kept


@pytest.mark.parametrize(
    "state, seen", [("idle", ("connected", 0.0)), ("working", ("connected", 0.0)), ("away", ("away", 3.0))]
)
def test_what_a_client_is_doing_is_told_only_where_it_may_be(state, seen):
    assert SAMPLED.activity(state, 3.0) == seen
    assert OPEN.activity(state, 3.0) == EVERYONE.activity(state, 3.0) == (state, 3.0)


def test_no_other_room_decides_what_is_secret():
    rooms = [*(ROOT / "server").rglob("*.py"), *(ROOT / "cloister").rglob("*.py")]
    assert [p.name for p in rooms if "fraction < 1" in p.read_text()] == ["disclosure.py"]
