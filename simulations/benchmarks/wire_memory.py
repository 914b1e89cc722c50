"""The mean of many replies: Flower's FedAvg on a list of them beside our running sum, each in a process of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import flwr.app
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from common.model.weights import Weights
from common.wire import codec, records
from common.wire.identity import identify_process
from server.rounds.fold import Fold
from simulations.benchmarks.wire_processes import LARGE, Children, forget_highest, megabytes, say, size, state, table

REPLIES, TURNS = 1000, 3
FLOWER, OURS = "Flower's FedAvg on a list", "our running sum"


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {FLOWER: [], OURS: []}
    for _ in range(TURNS):  # in turn
        for name, told in found.items():
            with Children() as children:
                told.append(children.role("wire_memory", name).greeting)
    best = {
        name: {key: sorted(t[key] for t in told)[TURNS // 2] for key in ("seconds", "peak")}
        for name, told in found.items()
    }
    rows = [(name, f"{b['seconds']:.3f} s", f"{b['peak']:,.1f} MB") for name, b in best.items()]
    ratios = [best[FLOWER][key] / best[OURS][key] for key in ("seconds", "peak")]
    rows.append(("Flower's / ours", f"{ratios[0]:.1f} x", f"{ratios[1]:,.0f} x"))
    parameters = size(state(LARGE)) // 4
    head = ("", "aggregation", "memory at its highest, more than before the first reply")
    table(f"The mean of {REPLIES:,} replies of {parameters:,} float32, median of {TURNS}", head, rows)
    print("\n  Flower's list is made before the clock starts; ours reads a reply's bytes outside of it as well.")


def _measure(name: str) -> None:
    identify_process("benchmark")
    arrays = state(LARGE)
    question = Message(RecordDict(), 1, "train", group_id="1")
    before = megabytes("self")
    forget_highest("self")
    seconds = _flower(question, arrays) if name == FLOWER else _ours(question, arrays)
    say(seconds=seconds, peak=megabytes("self", "VmHWM") - before)


def _flower(question: Message, arrays: Weights) -> float:
    replies = [
        _reply(question, ArrayRecord({key: flwr.app.Array(array) for key, array in arrays.items()}))
        for _ in range(REPLIES)
    ]
    started = time.perf_counter()
    FedAvg().aggregate_train(1, replies)
    return time.perf_counter() - started


def _ours(question: Message, arrays: Weights) -> float:
    started, reading = time.perf_counter(), 0.0
    fold = Fold(arrays)
    arriving = _arriving(question, arrays)
    for _ in range(REPLIES):
        before = time.perf_counter()
        reply = next(arriving)
        reading += time.perf_counter() - before
        metrics: MetricRecord = reply.content.metric_records[records.METRICS]
        weight = float(metrics[records.WEIGHT])  # type: ignore[arg-type]
        fold.add(records.to_weights(reply.content.array_records[records.ARRAYS]), weight)
    fold.mean()
    return time.perf_counter() - started - reading


def _arriving(question: Message, arrays: Weights) -> Iterator[Message]:
    """Replies as the grid makes them: one at a time, from bytes that are its own."""
    content = codec.encode(_reply(question, records.from_weights(arrays)).content)
    while True:
        yield Message(codec.decode(bytes(bytearray(content))), reply_to=question)


def _reply(question: Message, arrays: ArrayRecord) -> Message:
    metrics = MetricRecord({records.WEIGHT: 160.0, records.LOSS: 0.5})
    return Message(RecordDict({records.ARRAYS: arrays, records.METRICS: metrics}), reply_to=question)


if __name__ == "__main__":
    _measure(sys.argv[1])
