"""A ledger in memory answers as the one on disk does."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from client.account.books import Charges
from client.account.entries import Entry
from client.account.ledger import Ledger
from client.account.memory_ledger import MemoryLedger
from common.errors import LedgerError

UPDATE = Entry(
    part="train",
    split="s",
    run="r",
    task="r/train/1",
    attempt=1,
    mechanism="gaussian",
    federation="f",
    content="c",
    noise_multiplier=1.0,
    sampling_rate=0.5,
    steps=3,
)
COUNT = replace(UPDATE, mechanism="geometric", epsilon=0.1, value=40, noise_multiplier=None)
COUNTS = replace(UPDATE, part="validation", sampling_rate=1.0)
EXACT = replace(UPDATE, mechanism="none", run="other")


@pytest.fixture(params=[MemoryLedger, lambda: Ledger(None)], ids=["memory", "sqlite"])
def ledger(request) -> Charges:
    return request.param()


def test_entries_come_back_in_their_order_with_the_time(ledger):
    given = [COUNT, UPDATE, COUNTS, EXACT]
    for i, entry in enumerate(given):
        assert ledger.count() == i
        ledger.charge(entry, after=i)
    found = ledger.entries()
    assert [replace(entry, time="") for entry in found] == given
    times = [entry.time for entry in found]
    assert times == sorted(times) and all(times)
    assert ledger.rounds() == 2
    assert ledger.last_round() == times[3]
    ledger.close()


def test_of_nothing_there_is_no_round(ledger):
    ledger.charge(COUNTS)
    assert (ledger.last_round(), ledger.rounds()) == ("", 0)


def test_what_somebody_else_has_charged_meanwhile_is_found(ledger):
    ledger.charge(UPDATE)
    with pytest.raises(LedgerError, match="Nothing is released"):
        ledger.charge(UPDATE, after=0)
    assert ledger.count() == 1


def test_a_plan_comes_back_as_it_was_stored(ledger):
    plan = {"rows": 40, "deal": ["s", "c"]}
    ledger.store_plan("r", copy.deepcopy(plan))
    assert ledger.plan("other") is None
    found = ledger.plan("r")
    assert found == plan
    found.pop("rows")  # what is made of it changes nothing
    assert ledger.plan("r") == plan
