from __future__ import annotations

import time

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict

from common.wire.identity import number
from simulations.inline import InlineGrid


def echo(message: Message, context: Context) -> Message:
    """Answers with its node's number, and how often that node was called."""
    calls = context.state.metric_records.setdefault("calls", MetricRecord({"n": 0}))
    calls["n"] += 1
    return Message(RecordDict({"m": MetricRecord({"node": context.node_id, "calls": calls["n"]})}), reply_to=message)


def grid(app=echo, nodes=(5, 3, 8)) -> InlineGrid:
    return InlineGrid(app, nodes, run="heart")


def messages(to: InlineGrid, *nodes: int) -> list[Message]:
    return [to.create_message(RecordDict(), "train", node, "1") for node in nodes]


def answers(replies: list[Message]) -> list[tuple[float, float]]:
    return [(r.content["m"]["node"], r.content["m"]["calls"]) for r in replies]


def test_replies_come_in_the_order_of_the_messages():
    inline = grid()
    assert [node for node, _ in answers(inline.send_and_receive(messages(inline, 8, 5, 3)))] == [8, 5, 3]


def test_a_reply_says_who_sent_it_and_what_it_answers():
    inline = grid()
    (reply,) = inline.send_and_receive([inline.create_message(RecordDict(), "evaluate", 3, "7")])
    metadata = reply.metadata
    assert (metadata.src_node_id, metadata.group_id, metadata.message_type) == (3, "7", "evaluate")


def test_each_node_keeps_its_own_state_between_messages():
    inline = grid()
    inline.send_and_receive(messages(inline, 5, 3))
    assert answers(inline.send_and_receive(messages(inline, 5, 8))) == [(5, 2), (8, 1)]


def test_a_grid_has_its_nodes_and_its_run():
    inline = grid()
    inline.set_run(7)
    assert list(inline.get_node_ids()) == [5, 3, 8]
    assert inline.run == number("heart")
    assert messages(inline, 5)[0].metadata.run_id == inline.run


def test_replies_are_pulled_once_and_unknown_ones_not_at_all():
    inline = grid()
    first, second = inline.push_messages(messages(inline, 5, 3))
    assert answers(inline.pull_messages([second, "unknown"])) == [(3, 1)]
    assert answers(inline.pull_messages([first, second])) == [(5, 1)]


def test_nodes_that_the_time_does_not_reach_are_not_asked():
    asked = []

    def slow(message: Message, context: Context) -> Message:
        asked.append(context.node_id)
        time.sleep(0.2)
        return echo(message, context)

    inline = grid(slow)
    assert len(inline.send_and_receive(messages(inline, 5, 3, 8), timeout=0.1)) == 1
    assert asked == [5]
    assert len(inline.send_and_receive(messages(inline, 5, 3, 8), timeout=60)) == 3


def test_a_bug_in_a_client_keeps_its_traceback():
    def broken(message: Message, context: Context) -> Message:
        raise ZeroDivisionError("a bug")

    inline = grid(broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        inline.send_and_receive(messages(inline, 5))
