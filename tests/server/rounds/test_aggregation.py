"""What every aggregator promises, and that a grid may do its work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from hypothesis import given
from hypothesis import strategies as st

from common.document.federation import Federation
from common.model import mlp
from common.model.update import Update, Updates
from common.model.weights import Weights
from common.privacy.noise import seeded
from common.wire import records
from common.wire.records import ARRAYS, METRICS, PRIVACY, WEIGHT
from server.rounds.admission import Admission, Fault, Partial, Rejection, check_weights, reach_of
from server.rounds.aggregation import Aggregator, EachReply, Mean
from server.rounds.client_privacy import ClientLevelDP, NoisyMean
from simulations.inline import InlineGrid
from tests.server.fakes import Clients, outcome, says, train, train_to_nan
from tests.support import PRIVATE, WHOLE, federation, stated

DOCUMENT = federation(**WHOLE, privacy__client__adaptive={"quantile": 0.5, "learning_rate": 0.3, "share": 0.1})
START: Weights = mlp.weights_of(mlp.build(DOCUMENT))
MAKERS: dict[str, Callable[[], Aggregator]] = {
    "each": EachReply,
    "mean": lambda: Mean(START),
    "noisy mean": lambda: ClientLevelDP(DOCUMENT, seeded(4)).aggregator(START),
}


def updates(number: int) -> dict[int, Update]:
    rng = np.random.default_rng(2)
    return {
        node: Update(
            weights={name: (a + rng.normal(size=a.shape)).astype(np.float32) for name, a in START.items()},
            weight=float(rng.integers(1, 50)),
            loss=float(rng.random()),
        )
        for node in range(1, number + 1)
    }


UPDATES = updates(6)


def told(aggregator: Aggregator) -> list[Any]:
    found = [(node, u.weight, [a.tobytes() for a in u.weights.values()]) for node, u in aggregator.finish()]
    clip = aggregator._mechanism.clip if isinstance(aggregator, NoisyMean) else None  # which follows from the updates
    return [aggregator.loss, clip, found]


def together(maker: Callable[[], Aggregator], nodes: Iterable[int]) -> Aggregator:
    one = maker()
    for node in nodes:
        one.add(node, UPDATES[node])
    return one


@pytest.mark.parametrize("kind", MAKERS)
@given(st.permutations(list(UPDATES)), st.lists(st.integers(0, 6), max_size=3), st.booleans())
def test_neither_the_order_nor_where_updates_were_put_together_changes_a_bit(kind, order, cuts, backwards):
    maker = MAKERS[kind]
    parts = [together(maker, order[a:b]) for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 6], strict=True)]
    whole, *others = reversed(parts) if backwards else parts
    for other in others:
        whole.merge(other)
    assert told(whole) == told(together(maker, UPDATES))


def stacked(nodes: Iterable[int]) -> Updates:
    some = [UPDATES[node] for node in nodes]
    return Updates(
        flat=np.array([np.concatenate([a.reshape(-1) for a in u.weights.values()]) for u in some], np.float32),
        weights=np.array([u.weight for u in some]),
        losses=np.array([u.loss for u in some]),
        like=START,
    )


@pytest.mark.parametrize("kind", MAKERS)
@given(st.permutations(list(UPDATES)), st.integers(1, 5))
def test_updates_taken_all_at_once_are_as_if_taken_one_by_one(kind, order, cut):
    found = MAKERS[kind]()
    for some in (order[:cut], order[cut:]):
        updates = stacked(some)
        found.add_all(some, updates)
        updates.flat[:] = np.nan  # their memory is another's now
    assert told(found) == told(together(MAKERS[kind], UPDATES))


def test_updates_can_be_picked_and_are_those_of_single_clients():
    several = stacked([3, 1, 5]).take([2, 0])
    assert [(u.weight, u.loss) for u in several] == [(UPDATES[n].weight, UPDATES[n].loss) for n in (5, 3)]
    for found, node in zip(several, (5, 3), strict=True):
        assert all(np.array_equal(found.weights[name], array) for name, array in UPDATES[node].weights.items())
    (alone,) = Updates.of(UPDATES[2])
    assert (alone.weight, alone.loss) == (UPDATES[2].weight, UPDATES[2].loss)
    assert all(np.array_equal(alone.weights[name], array) for name, array in UPDATES[2].weights.items())


@pytest.mark.parametrize("kind, replies", [("each", 0), ("mean", 0), ("noisy mean", 1)])
def test_of_nothing_comes_nothing_unless_that_would_tell_who_was_asked(kind, replies):
    nothing = MAKERS[kind]()
    assert len(nothing.finish()) == replies
    assert nothing.loss is None


def test_each_reply_and_its_mean_have_the_figures_of_arithmetic():
    each, mean = (together(MAKERS[kind], UPDATES) for kind in ("each", "mean"))
    assert dict(each.finish()) == UPDATES
    ((_, found),) = mean.finish()
    total = sum(u.weight for u in UPDATES.values())
    assert found.weight == total
    assert mean.loss == each.loss == pytest.approx(sum(u.weight * (u.loss or 0) for u in UPDATES.values()) / total)
    for name, array in found.weights.items():
        exact = sum(u.weight * u.weights[name].astype(np.float64) for u in UPDATES.values()) / total
        assert np.allclose(array, exact, rtol=1e-6)


# A grid that puts updates together where they are made


class FoldingGrid(InlineGrid):
    """Calls clients as an InlineGrid does, and answers for three of them at a time."""

    def answers(
        self, messages: Iterable[Message], *, aggregator: Callable[[], Aggregator], **others: Any
    ) -> Generator[Message | Partial]:
        sent_to = list(messages)
        for some in (sent_to[i : i + 3] for i in range(0, len(sent_to), 3)):
            part, nodes, rejected, statements = aggregator(), set(), [], {}
            for reply in self.stream(some):
                node = reply.metadata.src_node_id
                if reply.has_error():
                    rejected.append(Rejection(node, reply.error.code, reply.error.reason))
                    continue
                update = records.to_update(reply.content)
                sent = records.to_weights(some[0].content[ARRAYS])
                try:
                    check_weights(update.weights, sent, reach_of(sent))
                except Fault as fault:
                    rejected.append(fault.of(node))
                    continue
                part.add(node, update)
                nodes.add(node)
                if PRIVACY in reply.content:
                    statements[node] = dict(reply.content[PRIVACY].items())
            yield Partial(aggregate=part, nodes=frozenset(nodes), rejected=tuple(rejected), statements=statements)


def stating(message: Message) -> Any:
    """A private client: it states what it has released, and no loss."""
    answer = train(message, metrics={WEIGHT: 10.0})
    answer[PRIVACY] = ConfigRecord(dict(stated()))
    return answer


ODD = {(1, 2): train_to_nan, (2, 3): says(1003, "it broke"), 7: says(1001)}


@pytest.mark.parametrize(
    "document, odd",
    [
        (federation(training__rounds=4), ODD),
        (federation(training__rounds=4, strategy={"name": "fedmedian", "min_clients": 2}), ODD),
        (federation(training__rounds=4, **WHOLE), ODD),
        (federation(**{**PRIVATE, "training__rounds": 2}), dict.fromkeys(range(1, 9), stating)),
    ],
    ids=["mean", "each reply", "client privacy", "row privacy"],
)
def test_a_grid_that_folds_gives_the_same_run(document: Federation, odd):
    nodes = range(1, 9)
    plain, folded = (
        outcome(document, clients, nodes=nodes, grid=grid(clients, nodes, run="test"), noise=seeded(3))  # type: ignore[arg-type]
        for grid, clients in ((InlineGrid, Clients(odd)), (FoldingGrid, Clients(odd)))
    )
    assert plain.ending.status == folded.ending.status == "completed"
    assert all(np.array_equal(plain.run.progress.weights[name], folded.run.progress.weights[name]) for name in START)
    assert (
        plain.run.progress.statements == folded.run.progress.statements
        and plain.run.progress.clients == folded.run.progress.clients
    )
    for one, other in zip(plain.rounds(), folded.rounds(), strict=True):
        assert {k: v for k, v in one.items() if k not in ("seconds", "times", "waiting")} == {
            k: v for k, v in other.items() if k not in ("seconds", "times", "waiting")
        }


def partial(**changes: Any) -> Partial:
    part = Mean(START)
    part.add(1, UPDATES[1])
    given: dict[str, Any] = {
        "aggregate": part,
        "nodes": frozenset({1}),
        "statements": {1: stated(epsilon=0.5, planned_epsilon=0.5)},
    }
    return Partial(**{**given, **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"nodes": frozenset({1, 9})}, "it has clients that round 5 did not ask, or one"),
        ({"rejected": (Rejection(1, 0, "x"),)}, "it has clients that round 5 did not ask, or one"),
        ({"statements": {}}, "private clients must state what they have released"),
        ({"statements": {1: stated(epsilon=-1.0)}}, "the privacy statement's epsilon is -1"),
    ],
)
def test_a_partial_result_that_is_not_in_order_counts_for_nobody(changes, reason):
    admission = Admission(asked={1, 2}, server_round=5, metrics={METRICS}, private=True, limit=1.0, sent=START)
    assert not admission.take_partial(partial(**changes))
    assert admission.nodes == set() and admission.statements == {}
    assert {r.node_id for r in admission.rejected} == set(changes.get("nodes", {1}))
    assert all(r.reason.startswith(f"a partial result was left out: {reason}") for r in admission.rejected)


def test_nobody_counts_twice_by_a_partial_result():
    admission = Admission(asked={1, 2}, server_round=5, metrics={METRICS}, private=True, limit=1.0, sent=START)
    assert admission.take_partial(partial())
    assert not admission.take_partial(partial())
    assert admission.nodes == {1} and admission.silent == [2]
