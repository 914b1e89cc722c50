"""The names of Flower's nodes: what people are shown, and what no client can make of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from common.wire import records
from common.wire.records import CLIENT, METRICS, NAME
from server.rounds.flower_grid import FlowerGrid
from simulations.inline import InlineGrid


class Link(InlineGrid):
    """Hands over one reply a look, by the id of its message, as a SuperLink may."""

    looks = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(str(len(self._replies) + 1000))
            message.metadata.__dict__["_message_id"] = ids[-1]
            (self._replies[ids[-1]],) = self.stream([message])
        return [*ids, None]  # type: ignore[list-item]  # Flower's, for a message that it could not send

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.looks += 1
        return [self._replies.pop(i) for i in list(message_ids)[:1] if i in self._replies]


def named(*rounds: dict[int, Any], names: bool = True) -> FlowerGrid:
    """A grid after rounds in which each node called itself what is given: a name, None for nothing, or an error."""
    said = iter(rounds)

    def app(message: Message, context: Context) -> Message:
        answer = now[context.node_id]
        if isinstance(answer, Error):
            return Message(answer, reply_to=message)
        content = RecordDict({METRICS: MetricRecord({"num-examples": 1.0})})
        if answer is not None:
            content[CLIENT] = answer if isinstance(answer, ConfigRecord) else ConfigRecord({NAME: answer})
        return Message(content, reply_to=message)

    grid = FlowerGrid(Link(app, rounds[0], run="r"), names=names)
    for now in said:
        asked = [Message(RecordDict(), node, "train", group_id="1") for node in now]
        replies = list(grid.send_and_receive(asked, timeout=5))
        assert [r.metadata.src_node_id for r in replies] == list(now)
        # Admission is shown what it always was: a record that it does not expect would be a fault.
        assert all(list(r.content) == [METRICS] for r in replies if r.has_content())
    return grid


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("server.rounds.flower_grid.POLL_S", 0.001)


def test_a_node_is_shown_by_the_name_that_it_says():
    grid = named({11: "cleveland", 12: "va"})
    assert (grid.name_of(11), grid.name_of(12), grid.nodes) == ("cleveland", "va", {"cleveland": "11", "va": "12"})


def test_a_node_that_has_not_answered_or_says_nothing_is_shown_by_its_number():
    grid = named({11: None, 12: "va"})
    assert (grid.name_of(11), grid.name_of(13), grid.nodes) == ("11", "13", {"va": "12"})


@pytest.mark.parametrize("second", ["cleveland", "Cleveland"])
def test_of_two_nodes_that_say_one_name_the_second_is_shown_by_its_number(second, caplog):
    grid = named({11: "cleveland", 12: second}, {12: second, 11: "cleveland"})
    assert (grid.name_of(11), grid.name_of(12), grid.nodes) == ("cleveland", "12", {"cleveland": "11"})
    assert f"node 12 calls itself {second} as node 11 does" in caplog.text


@pytest.mark.parametrize(
    "said", ["", "12", "\x1b[2J", "two words", "-x", "x" * 257, 7, ["va"], ConfigRecord({"other": "va"})], ids=repr
)
def test_what_is_no_name_or_could_be_a_number_is_not_shown(said):
    grid = named({11: said, 12: "va"})
    assert (grid.name_of(11), grid.nodes) == ("11", {"va": "12"})


def test_a_name_that_changes_stays_as_it_was_so_that_a_run_folder_has_one_for_each_node(caplog):
    grid = named({11: "cleveland", 12: None}, {11: "va", 12: "cleveland-2"}, {11: "cleveland", 12: "12"})
    assert (grid.name_of(11), grid.name_of(12)) == ("cleveland", "12")
    assert caplog.text.count("node 11 is shown as cleveland, and now calls itself 'va'") == 1


def test_an_error_says_no_name_and_leaves_it_to_the_next_answer():
    refuses = Error(code=records.REFUSED, reason="no")
    assert named({11: refuses}).name_of(11) == "11"
    assert named({11: refuses}, {11: "cleveland"}).name_of(11) == "cleveland"


def test_where_replies_are_hidden_names_are_not_heard():
    grid = named({11: "cleveland"}, names=False)
    assert (grid.name_of(11), grid.nodes) == ("11", {})


def test_a_round_ends_at_its_deadline_with_what_has_come():
    grid = FlowerGrid(Link(lambda message, context: message, [1], run="r"), names=True)
    grid._grid.pull_messages = lambda ids: []  # type: ignore[method-assign]
    started = time.monotonic()
    assert list(grid.send_and_receive([Message(RecordDict(), 1, "train", group_id="1")], timeout=0.05)) == []
    assert 0.05 <= time.monotonic() - started < 2


def test_who_is_there_is_asked_of_flower_a_few_times_a_second_and_no_more(monkeypatch):
    grid, asked = named({11: "cleveland", 12: None}), []
    monkeypatch.setattr("server.rounds.flower_grid.POLL_S", 60.0)
    there = [[11], [11, 12]]
    monkeypatch.setattr(grid._grid, "get_node_ids", lambda: asked.append(1) or there[len(asked) - 1])
    assert [list(grid.get_node_ids()) for _ in range(3)] == [[11]] * 3 and len(asked) == 1
    monkeypatch.setattr("server.rounds.flower_grid.POLL_S", 0.0)
    assert list(grid.get_node_ids()) == [11, 12]
