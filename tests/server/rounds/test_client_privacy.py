"""Whole clients protected by the server: sampling, clipping, noise, the fixed denominator, and the account."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.document.federation import Federation
from common.errors import PrivacyError
from common.model import mlp
from common.model.update import Update
from common.model.weights import Weights, initial_weights
from common.privacy.noise import NoiseSource, seeded
from common.privacy.releases import client_releases, epsilon
from common.wire import records
from common.wire.records import ARRAYS, BUDGET_EXHAUSTED, COUNTS, LOSS, METRICS, WEIGHT
from server.app import execute
from server.folder.folder import RunFolder
from server.rounds.client_privacy import ClientLevelDP, NoisyMean
from server.rounds.events import Event
from server.rounds.run import Run
from simulations.engine import simulate
from simulations.inline import InlineGrid
from simulations.sources import sites_from_table
from tests.server.fakes import Answer, Clients, outcome, says, train
from tests.support import WHOLE, federation, recomputed, table


class Silent(NoiseSource):
    """Draws uniforms from a seed, and noise that is 0."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(np.random.default_rng(seed).bytes, hardened=False)

    def rounded_normal(self, size: int, tau: float) -> NDArray[np.int64]:
        return np.zeros(size, np.int64)


def whole(**changes: Any) -> Federation:
    return federation(**{**WHOLE, **changes})


def reply(state: Weights, *, weight: float = 10.0, counts: list[float] | None = None) -> Message:
    """A client's reply, as far as aggregation looks at it."""
    content = RecordDict({ARRAYS: records.from_weights(state), METRICS: MetricRecord({WEIGHT: weight})})
    if counts is not None:
        content = RecordDict({METRICS: MetricRecord({WEIGHT: weight, COUNTS: counts})})
    return InlineGrid(lambda m, c: m, [1], run="t").create_message(content, "train", 1, "1")  # type: ignore[arg-type]


def mean(mechanism: ClientLevelDP, state: Weights, replies: Iterable[Message]) -> Weights:
    """`state` moved by the replies, as a round moves it."""
    together = mechanism.aggregator(state)
    for node, one in enumerate(replies):
        together.add(node, records.to_update(one.content))
    ((_, update),) = together.finish()
    return update.weights


def counted(mechanism: ClientLevelDP, replies: Iterable[Message]) -> NDArray[np.float64]:
    return mechanism.counts([np.asarray(r.content.metric_records[METRICS][COUNTS], np.float64) for r in replies])


def flat(state: Weights) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(a) for a in state.values()]).astype(np.float64)


def moved(state: Weights, by: Callable[[int], NDArray[np.float64]]) -> Weights:
    """`state` with a vector added to it."""
    new, start = {}, 0
    vector = by(flat(state).size)
    for name, array in state.items():
        new[name] = (array + vector[start : start + array.size].reshape(array.shape)).astype(np.float32)
        start += array.size
    return new


def in_direction(length: float) -> Callable[[int], NDArray[np.float64]]:
    return lambda size: np.full(size, length / math.sqrt(size))


@pytest.fixture
def state() -> Weights:
    return mlp.weights_of(mlp.build(whole()))


# Clipping, weights, the denominator


@pytest.mark.parametrize("length, counted", [(0.25, 0.25), (1.0, 1.0), (40.0, 1.0), (1e30, 1.0)])
def test_an_update_counts_up_to_the_clip(state, length, counted):
    document = whole(strategy__fraction=0.5)
    after = mean(ClientLevelDP(document, Silent()), state, [reply(moved(state, in_direction(length)))])
    # The sum of one update, over fraction x clients = 4.5.
    assert np.linalg.norm(flat(after) - flat(state)) == pytest.approx(counted / 4.5, rel=1e-4)


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_missing_replies_leave_their_place_empty_and_neither_noise_nor_charge_changes(state, answers):
    mechanism = ClientLevelDP(whole(), Silent())
    after = mean(mechanism, state, [reply(moved(state, in_direction(0.5)))] * answers)
    assert np.linalg.norm(flat(after) - flat(state)) == pytest.approx(answers * 0.5 / 9, abs=1e-6)
    assert mechanism.charged.updates == 1
    noisy = ClientLevelDP(whole(), seeded(3))
    alone = flat(mean(noisy, state, [])) - flat(state)
    other = ClientLevelDP(whole(), seeded(3))
    with_some = flat(mean(other, state, [reply(state)] * answers)) - flat(state)
    assert alone == pytest.approx(with_some, abs=1e-6)
    assert noisy.epsilon == other.epsilon > 0


@pytest.mark.parametrize("rows, weight", [(50, 0.5), (100, 1.0), (1e12, 1.0), (1e-9, 1e-11)])
def test_weights_are_capped_so_that_no_client_counts_more_than_once(state, rows, weight):
    document = whole(privacy__client__weight_cap=100)
    after = mean(ClientLevelDP(document, Silent()), state, [reply(moved(state, in_direction(1.0)), weight=rows)])
    assert np.linalg.norm(flat(after) - flat(state)) == pytest.approx(weight / 9, rel=1e-3, abs=1e-9)


def test_without_a_cap_all_clients_count_the_same(state):
    one, many = (
        flat(mean(ClientLevelDP(whole(), Silent()), state, [reply(moved(state, in_direction(1.0)), weight=rows)]))
        for rows in (1, 1e6)
    )
    assert np.array_equal(one, many)


# Noise


def variance_is(found: NDArray[np.float64], std: float) -> bool:
    """Is the sample's variance within 5 standard errors of std^2?"""
    return abs(float(np.mean((found / std) ** 2)) - 1) < 5 * math.sqrt(2 / len(found))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_model_that_leaves_carries_the_noise_that_is_accounted(share):
    adaptive = {"privacy__client__adaptive": {"share": share}} if share else {}
    document = whole(**adaptive, model__hidden=[4000], strategy__fraction=0.5, privacy__client__clip=2.5)
    state = mlp.weights_of(mlp.build(document))
    mechanism = ClientLevelDP(document, seeded(11))
    clipped = [reply(moved(state, in_direction(9.0))), reply(moved(state, in_direction(0.5)))]
    signal = flat(mean(ClientLevelDP(document, Silent()), state, clipped))
    noise = flat(mean(mechanism, state, clipped)) - signal
    assert len(noise) >= 20_000
    # multiplier x clip / denominator, and a little more where the clip's count takes its share
    std = client_releases(document)[0].noise_multiplier * 2.5 / 4.5 / math.sqrt(1 - share)
    assert variance_is(noise, std)
    assert not variance_is(noise, std * 1.05)  # the test would see noise that is 5 % off
    assert not variance_is(noise, std / 1.05)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / math.sqrt(len(noise))


def test_metrics_carry_noise_and_no_client_weighs_more_than_another():
    document = whole()
    counts = [reply({}, counts=[3.0, 1.0, 2.0, 4.0]), reply({}, counts=[0.0, 0.0, 0.0, 1e9])]
    exact = counted(ClientLevelDP(document, Silent()), counts)
    assert exact == pytest.approx([0.3, 0.1, 0.2, 1.4], abs=2 * 2.0**-21)  # each client's are rounded to 2^-20
    samples = np.concatenate([counted(ClientLevelDP(document, seeded(i)), counts) - exact for i in range(400)])
    assert variance_is(samples, 3.0)
    assert not variance_is(samples, 3.0 * 1.3)


def test_a_client_that_lies_about_its_counts_moves_them_by_no_more_than_the_sensitivity():
    exact = counted(ClientLevelDP(whole(), Silent()), [reply({}, counts=[1e30, -1e30, 5.0, -5.0])])
    assert 0.99 < np.linalg.norm(exact) <= 1.0 + 3 * 2.0**-20  # 2^20 + floor(sqrt(4) / 2) + 2 units


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_counts_and_updates_that_are_not_finite_count_as_zeros(state, bad):
    good = reply({}, counts=[3.0, 1.0, 2.0, 4.0])
    alone, beside = (
        counted(ClientLevelDP(whole(), Silent()), replies)
        for replies in ([good], [good, reply({}, counts=[0.0, 1.0, bad, 2.0])])
    )
    assert np.array_equal(alone, beside) and alone.any()
    fine = reply(moved(state, in_direction(0.5)))
    poisoned = reply({name: np.full_like(array, bad) for name, array in state.items()})
    alone, beside = (flat(mean(ClientLevelDP(whole(), Silent()), state, r)) for r in ([fine], [fine, poisoned]))
    assert np.array_equal(alone, beside) and not np.array_equal(alone, flat(state))


def test_counts_too_large_to_be_summed_count_as_zeros():
    assert not counted(ClientLevelDP(whole(), Silent()), [reply({}, counts=[1.7e308] * 4)]).any()


# What leaves is a function of integers


def finer(released: NDArray[np.float64], unit: float) -> float:
    """The share of numbers that are no multiples of `unit`, a power of two: those have bits that can tell a sum."""
    return float(np.mean(released / unit != np.rint(released / unit)))


POWERS = {"strategy__fraction": 0.5, "privacy__client__clients": 8, "privacy__client__clip": 0.5}  # a denominator of 4
UNIT = 0.5 / 2**24 / 4


def cohort(*seeds: int, scale: float = 0.1) -> list[Message]:
    """Updates from a start of zeros, in float64, which keeps every bit of a sum."""
    return [reply({"a": np.random.default_rng(seed).normal(0, scale, 600)}) for seed in seeds]


ZEROS: Weights = {"a": np.zeros(600)}  # type: ignore[dict-item]  # float64, so that what leaves is not rounded again


def test_no_bit_of_a_model_tells_whether_a_client_is_in_it():
    document = whole(**POWERS)
    with_it, without = (
        flat(mean(ClientLevelDP(document, seeded(7)), ZEROS, cohort(*seeds))) for seeds in ((1, 2), (1,))
    )
    assert finer(with_it, UNIT) == finer(without, UNIT) == 0
    # The same noise, so they differ by the client's integers: as long as the clip, but for rounding.
    part = (with_it - without) / UNIT
    assert 0.999 * 2**24 < np.linalg.norm(part) <= 2**24 + math.sqrt(600) / 2 + 3
    # Negative control: what left before, floats summed with floats.
    update = np.random.default_rng(1).normal(0, 0.1, 600)
    clipped = update * 0.5 / np.linalg.norm(update)
    noise = np.random.default_rng(7).normal(0, 1, 600)
    assert finer((clipped + noise) / 4, UNIT) > 0.9


def test_no_bit_of_the_counts_tells_whether_a_client_is_in_them():
    replies = [reply({}, counts=[1.0, 1.0, 1.0, n]) for n in (0.0, 4.0)]  # thirds, and sevenths
    pairs = [[counted(ClientLevelDP(whole(), seeded(i)), some) for some in (replies, replies[:1])] for i in range(50)]
    with_it, without = np.array(pairs).transpose(1, 0, 2)
    assert finer(with_it, 2.0**-20) == finer(without, 2.0**-20) == 0
    assert np.linalg.norm(with_it - without, axis=1).max() <= 1 + 3 * 2.0**-20
    noise = np.random.default_rng(0).normal(0, 3, (50, 4))
    assert finer(noise + 1 / 3, 2.0**-20) > 0.9


def test_the_clip_follows_an_integer():
    document = whole(**ADAPTIVE)
    replies = cohort(1, 2, scale=0.001)

    def count(seed: int, replies: list[Message]) -> float:
        """Taken back from clip x exp(-0.3 (count / 9 + 1/2 - 1/2)), to 1e-13 where it is not cut off."""
        mechanism = ClientLevelDP(document, seeded(seed))
        mean(mechanism, ZEROS, replies)
        return -math.log(mechanism.clip) / 0.3 * 9 * 2**20

    pairs = np.array([[count(seed, replies), count(seed, [])] for seed in range(200)])
    pairs = pairs[(abs(pairs) < 4.4 * 2**20).all(axis=1)]
    assert len(pairs) > 30
    assert abs(pairs - np.rint(pairs)).max() < 1e-6
    assert np.array_equal(np.rint(pairs[:, 0] - pairs[:, 1]), np.full(len(pairs), 2**20))  # twice 2^19
    floats = np.random.default_rng(0).normal(0, 2**20, 200)
    assert abs(floats - np.rint(floats)).max() > 0.4


def test_the_order_of_replies_changes_no_bit():
    replies = cohort(*range(6))
    states = {
        flat(mean(ClientLevelDP(whole(**POWERS), seeded(3)), ZEROS, [replies[i] for i in order])).tobytes()
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 4, 0, 5, 1, 3])
    }
    assert len(states) == 1
    vectors = [np.random.default_rng(seed).normal(0, 0.1, 600) for seed in range(6)]
    assert sum(vectors).tobytes() != sum(vectors[::-1]).tobytes()  # type: ignore[union-attr]  # sums of floats do


def test_with_weights_a_client_is_still_a_vector_of_integers():
    document = whole(**POWERS, privacy__client__weight_cap=3)
    message = reply({"a": np.random.default_rng(1).normal(0, 0.1, 600)}, weight=1.0)
    after = flat(mean(ClientLevelDP(document, Silent()), ZEROS, [message]))
    assert finer(after, UNIT) == 0
    assert np.linalg.norm(after) == pytest.approx(0.5 / 3 / 4, rel=1e-6)


def test_noise_that_has_no_integers_is_refused():
    # So small a share of a round's privacy for the clip's count would need noise of 10^9.
    tiny = {"quantile": 0.5, "share": 1e-18}
    with pytest.raises(PrivacyError, match=r"noise multiplier .* is above 1\.34218e\+08; raise epsilon, or take a"):
        ClientLevelDP(whole(privacy__client__adaptive=tiny), Silent())


# Sampling


def test_clients_are_asked_independently_each_with_the_fraction():
    document = whole(strategy__fraction=0.3)
    mechanism = ClientLevelDP(document, seeded(1))
    drawn = np.zeros((4000, 9))
    for row in drawn:
        row[mechanism.sample(list(range(9)))] = 1
    assert drawn.mean(axis=0) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 4000))
    # A fixed size would have no variance; independent draws have n q (1 - q).
    assert drawn.sum(axis=1).var() == pytest.approx(9 * 0.21, rel=0.15)
    assert (drawn.sum(axis=1) == 0).any()
    off = np.corrcoef(drawn.T)[~np.eye(9, dtype=bool)]
    assert abs(off).max() < 6 / math.sqrt(4000)


def test_sampling_and_noise_of_a_real_server_follow_no_seed(tmp_path):
    def models_of(number: int) -> bytes:
        folder = RunFolder.create(whole(training__rounds=1), path=tmp_path / str(number))
        grid = InlineGrid(Clients(), (1, 2, 3), run="t")  # type: ignore[arg-type]
        execute(whole(training__rounds=1), grid, folder, name="t", wait_s=0.0)
        return (folder.path / "model.safetensors").read_bytes()

    assert models_of(1) != models_of(2)


def test_a_round_that_asks_nobody_still_takes_its_noisy_step():
    document = whole(strategy__fraction=1e-9, training__rounds=4)
    clients = Clients()
    result = outcome(document, clients)
    assert [kind for kind, *_ in clients.asked if kind == "train"] == []
    assert (result.ending.status, result.run.progress.round) == ("completed", 4)
    assert result.run.client_privacy is not None and result.run.client_privacy.charged.updates == 4
    assert len({flat(state).tobytes() for _, state in result.saved}) == 4


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi", "fedprox"])
def test_every_strategy_of_a_mean_moves_by_the_noisy_mean(strategy):
    clients = Clients()
    result = outcome(whole(strategy__name=strategy, strategy__min_clients=3, training__rounds=3), clients)
    assert result.ending.status == "completed"
    assert len({flat(state).tobytes() for _, state in result.saved}) == 3
    assert not np.array_equal(flat(result.run.progress.weights), flat(result.start))


# In the round loop


def test_a_reply_that_is_bad_or_missing_changes_no_round_and_no_charge():
    nan = {2: lambda message: _nan(message), 3: lambda message: None}
    result = outcome(whole(training__rounds=3), Clients(nan))
    assert (result.ending.status, result.run.progress.round) == ("completed", 3)
    assert all(np.isfinite(flat(state)).all() for _, state in result.saved)
    assert result.run.client_privacy is not None and result.run.client_privacy.charged.updates == 3
    # Nor is it told whose reply it was: members of a round are those that were there.
    assert [event["members"] for event in result.events if event["event"] == "round"] == [["1", "2", "3"]] * 3


def _nan(message: Message) -> Answer:
    answer = train(message)
    assert isinstance(answer, RecordDict)
    broken = {name: np.full_like(array.numpy(), np.nan) for name, array in answer.array_records[ARRAYS].items()}
    return RecordDict({ARRAYS: records.from_weights(broken), METRICS: MetricRecord({WEIGHT: 1.0, LOSS: 0.5})})


def test_whether_a_reply_counts_does_not_depend_on_what_others_weigh(monkeypatch):
    # Else one client, by being there, could add or remove another: twice the sensitivity that the noise is for.
    heard: list[int] = []
    add = NoisyMean.add

    def listening(self: NoisyMean, node: int, update: Update) -> None:
        heard.append(node)
        add(self, node, update)

    monkeypatch.setattr(NoisyMean, "add", listening)

    def heavy(message: Message) -> Answer:
        answer = train(message)
        answer[METRICS][WEIGHT] = 1e11  # type: ignore[index]
        return answer

    outcome(whole(strategy__fraction=1.0, training__rounds=1), Clients({1: heavy}))
    assert sorted(heard) == [1, 2, 3]


def test_no_event_tells_who_was_asked_what_was_lost_or_any_exact_figure():
    odd = {(1, 2): says(BUDGET_EXHAUSTED, "spent"), (2, 3): lambda message: None, (3, 1): lambda message: _nan(message)}
    document = whole(training__rounds=3, strategy__fraction=0.6)
    clients = Clients(odd, evaluates=lambda message: None)  # a lost link while it evaluates tells something too
    result = outcome(document, clients, nodes=(1, 2, 3, 4, 5), noise=Silent(5))
    for event in result.rounds():
        assert event["clients"] == event["asked"] >= 4  # all that are connected
        assert event["train"] == {"loss": None}
        assert {r["kind"] for r in event["rejected"]} <= {"budget_exhausted"}
        assert "failed" not in event
    assert result.run.progress.clients == {"1", "2", "3", "4", "5"}


def test_the_charge_is_written_before_the_model_and_the_metrics(tmp_path):
    document = whole(training__rounds=3)
    order: list[str] = []

    class Watched(RunFolder):
        def write(self, name: str, data: bytes, **how: bool) -> None:
            order.append(name)
            super().write(name, data, **how)

        def record(self, event: Event) -> None:
            order.append("metrics" if "evaluation" in event.to_json() else event.KIND)
            super().record(event)

    folder = Watched.create(document, path=tmp_path / "run")
    execute(document, InlineGrid(Clients(), (1, 2, 3), run="t"), folder, name="t", wait_s=0.0)  # type: ignore[arg-type]
    each = ["privacy.json", "model.safetensors", "round"]
    last = ["privacy.json", "model.safetensors", "privacy.json", "model.safetensors", "metrics"]
    begin, end = (
        ["federation.yaml", "start", "model.safetensors"],
        ["model.safetensors", "privacy.json", "result.json", "end"],
    )
    assert order == [*begin, *each, *each, *last, *end]


def test_the_model_and_what_it_cost_are_one_file(tmp_path):
    document = whole(training__rounds=3)
    folder = RunFolder.create(document, path=tmp_path / "run")
    execute(document, InlineGrid(Clients(), (1, 2, 3), run="t"), folder, name="t", wait_s=0.0)  # type: ignore[arg-type]
    data = (folder.path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["cloister"])
    assert (about["round"], about["charged"]) == (3, {"updates": 3, "evaluations": 1})


# The account


def run(tmp_path: Path, document: Federation, clients: int) -> tuple[dict[str, Any], dict[str, Any]]:
    table(400).write_csv(tmp_path / "table.csv")
    sites = sites_from_table(
        document, tmp_path / "table.csv", clients=clients, how="iid", seed=0, device=torch.device("cpu")
    )
    folder = RunFolder.create(document, path=tmp_path / "run")
    result = simulate(document, sites, folder, run="test")
    return result, json.loads((folder.path / "privacy.json").read_text())


def test_frozen_arrays_have_no_part_in_the_clip_and_in_the_noise():
    fed = federation(**WHOLE, start={"sha256": "0" * 64, "frozen": [0]})
    weights, mechanism = initial_weights(fed), ClientLevelDP(fed, seeded(1))
    free, far = (mechanism.aggregator(weights) for _ in range(2))
    moved = {name: array + np.float32(0.1) for name, array in weights.items()}
    free.add(1, Update(weights=moved, weight=1.0))
    far.add(
        1,
        Update(weights={k: v + np.float32(1e6) if k in fed.frozen_arrays else v for k, v in moved.items()}, weight=1.0),
    )
    head = sum(array.size for name, array in weights.items() if name not in fed.frozen_arrays)
    assert len(free.total) == head < fed.parameters
    assert np.array_equal(free.total, far.total) and free.total.any()
    ((_, update),) = free.finish()
    assert list(update.weights) == list(weights)
    for name, array in update.weights.items():
        assert np.array_equal(array, weights[name]) == (name in fed.frozen_arrays)


def test_both_units_stand_side_by_side_and_each_can_be_recomputed(tmp_path):
    both = whole(
        privacy__row={"epsilon": 6.0, "delta": 1e-3, "clip": 1.0},
        strategy__fraction=0.5,
        training__rounds=6,
        privacy__client={"epsilon": 3.0, "delta": 1e-2, "clip": 0.5, "clients": 8},
    )
    result, statement = run(tmp_path, both, 8)
    assert result["status"] == "completed"
    unit = statement["client"]
    assert unit["epsilon"] == pytest.approx(recomputed(unit), rel=0.01)
    assert unit["epsilon"] == result["privacy"]["client"]["epsilon"] <= 3.0
    assert 0.98 * 3.0 < unit["epsilon"] == pytest.approx(unit["epsilon_so_far"])
    assert (unit["unit"], statement["row"]["unit"]) == ("one client", "one row of one client's table")
    assert result["privacy"]["row"]["epsilon"] == statement["row"]["epsilon"] == 6.0
    for key in ("neighbours", "adversary", "accountant", "not_covered"):
        assert unit[key] and statement["row"][key]
    assert unit["noise"] == "a seeded stream: for simulations only"


def test_with_both_units_no_figure_of_a_client_tells_when_it_was_asked(tmp_path):
    """A client's own epsilon grows when it is asked, and one that never was asked has none."""
    both = whole(privacy__row={"epsilon": 6.0, "delta": 1e-3, "clip": 1.0}, strategy__fraction=0.5, training__rounds=4)
    result, statement = run(tmp_path, both, 9)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    rows = [e["privacy"]["row"] for e in events if e["event"] == "round"]
    assert rows == [{"epsilon": 6.0, "per_client": {}}] * 4
    assert result["privacy"]["row"] == {"epsilon": 6.0, "delta": 1e-3, "per_client": {}}
    assert statement["row"]["per_client"] == {}
    assert "sampling keeps secret" in statement["row"]["withheld"]
    assert result["clients"] == [f"client-{i}" for i in range(9)]


def test_where_all_are_asked_their_figures_are_told(tmp_path):
    both = whole(privacy__row={"epsilon": 6.0, "delta": 1e-3, "clip": 1.0})
    result, statement = run(tmp_path, both, 3)
    assert len(result["privacy"]["row"]["per_client"]) == len(statement["row"]["per_client"]) == 3


def test_a_reason_could_tell_when_a_client_was_asked_so_it_is_not_told():
    odd = {2: says(BUDGET_EXHAUSTED, "policy.epsilon: 8, of which 7.5 is spent")}
    for fraction, told in ((0.9, False), (1.0, True)):
        result = outcome(whole(strategy__fraction=fraction), Clients(odd), noise=Silent(1))
        reasons = [r["reason"] for event in result.rounds() for r in event["rejected"]]
        assert [("7.5" in reason) for reason in reasons] == [told]


def test_a_run_that_was_stopped_states_what_it_had_planned(tmp_path):
    """When it stops may depend on its results, and the figure of so many steps holds for a number fixed beforehand."""
    document = whole(training__rounds=6, privacy__row={"epsilon": 6.0, "delta": 1e-3, "clip": 1.0})
    table(400).write_csv(tmp_path / "table.csv")
    sites = sites_from_table(document, tmp_path / "table.csv", clients=3, how="iid", seed=0, device=torch.device("cpu"))

    def stop(event: Event) -> None:
        if getattr(event, "round", 0) == 2:
            raise KeyboardInterrupt

    folder = RunFolder.create(document, path=tmp_path / "run")
    result = simulate(document, sites, folder, run="test", observe=stop)
    statement = json.loads((folder.path / "privacy.json").read_text())
    assert (result["status"], result["rounds"]) == ("stopped", 2)
    assert statement["client"]["epsilon_so_far"] < 3.5 < statement["client"]["epsilon"] <= 4.0
    assert result["privacy"]["client"]["epsilon"] == statement["client"]["epsilon"]
    assert statement["client"]["epsilon_so_far"] == pytest.approx(recomputed(statement["client"]), rel=0.01)
    assert max(result["privacy"]["row"]["per_client"].values()) < 5.5
    assert 5.9 < result["privacy"]["row"]["epsilon"] == statement["row"]["epsilon"] <= 6.0


def test_only_client_privacy_tells_no_loss_and_noisy_metrics(tmp_path):
    result, statement = run(tmp_path, whole(), 3)
    assert statement["row"] is None and result["privacy"]["row"] is None
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["train"]["loss"] for e in events if e["event"] == "round"] == [None] * 3
    assert result["evaluation"] is not None


def test_epsilon_grows_by_round_and_never_passes_the_limit():
    mechanism = ClientLevelDP(whole(training__rounds=6), Silent())
    state = mlp.weights_of(mlp.build(whole()))
    spent = []
    for _ in range(6):
        mean(mechanism, state, [])
        spent.append(mechanism.epsilon)
    for _ in range(2):
        counted(mechanism, [])
    assert spent == sorted(set(spent))
    assert mechanism.epsilon <= 4.0 < epsilon([*client_releases(whole(training__rounds=6))][:1] * 2, 0.01)


def test_evaluations_that_alone_cost_too_much_are_refused():
    with pytest.raises(PrivacyError, match=r"more than privacy\.client\.epsilon 0\.1; evaluate less often"):
        ClientLevelDP(whole(privacy__client__epsilon=0.1), Silent())


# Adaptive clipping


ADAPTIVE = {"privacy__client__adaptive": {"quantile": 0.5, "learning_rate": 0.3, "share": 0.1}}


def test_two_releases_of_a_round_cost_what_the_plan_charges_for_one():
    mechanism = ClientLevelDP(whole(**ADAPTIVE), seeded(0))
    adaptive = mechanism.statement()["released"][0]["adaptive_clip"]
    parts = [adaptive["update_noise_multiplier"], adaptive["count_noise_multiplier"]]
    # 1/z^2 = 1/z_update^2 + 1/z_count^2 (Andrew et al. 2021, theorem 1, whose sigma_b is half of z_count)
    assert sum(1 / z**2 for z in parts) == pytest.approx(1 / mechanism.updates.noise_multiplier**2)
    assert 1 / parts[1] ** 2 == pytest.approx(0.1 / mechanism.updates.noise_multiplier**2)


def test_the_clip_finds_the_quantile_of_the_norms(state):
    document = whole(**ADAPTIVE, privacy__client__clip=50.0)
    mechanism = ClientLevelDP(document, Silent())
    replies = [reply(moved(state, in_direction(length))) for length in np.linspace(1, 3, 9)]
    for _ in range(60):
        mean(mechanism, state, replies)
    assert mechanism.clip == pytest.approx(2.0, rel=0.2)  # half of the updates are longer than 2


def test_one_client_moves_the_count_by_half_and_its_noise_is_that_of_the_plan(state):
    document = whole(**ADAPTIVE)

    def clip_after(seed: int, lengths: list[float]) -> float:
        mechanism = ClientLevelDP(document, seeded(seed))
        mean(mechanism, state, [reply(moved(state, in_direction(length))) for length in lengths])
        return mechanism.clip

    # clip x exp(-0.3 (share - 0.5)), share = count / 9 + 0.5, undone where it is not cut off at 0 or 1
    counts = np.array([-math.log(clip_after(seed, [])) / 0.3 * 9 for seed in range(3000)])
    inside = counts[abs(counts) < 4.4]
    z = ClientLevelDP(document, Silent())._count_noise
    expected = np.random.default_rng(0).normal(0, z / 2, 10**6)
    expected = expected[abs(expected) < 4.4]
    assert len(inside) > 1000
    assert inside.std() == pytest.approx(expected.std(), rel=0.06)
    same = [clip_after(1, lengths) for lengths in ([], [0.5], [2.0])]
    steps = [-math.log(clip) / 0.3 * 9 for clip in same]
    assert steps[1] - steps[0] == pytest.approx(0.5)
    assert steps[2] - steps[0] == pytest.approx(-0.5)


def test_clients_that_are_away_do_not_pull_the_clip(state):
    mechanism = ClientLevelDP(whole(**ADAPTIVE), Silent())
    mechanism.sample([1, 2, 3, 4])  # of 9
    replies = [reply(moved(state, in_direction(length))) for length in (0.5, 0.5, 2.0, 2.0)]
    mean(mechanism, state, replies)
    assert mechanism.clip == pytest.approx(1.0)  # half of those that are here are within it
    mean(mechanism, state, replies[:2] * 2)
    assert mechanism.clip == pytest.approx(math.exp(-0.3 * 0.5))  # all of them


@pytest.mark.parametrize("length, direction", [(0.0, -1), (2e6, 1)])
def test_a_clip_that_runs_away_stays_where_its_unit_is_a_float(length, direction):
    adaptive = {"quantile": 0.5, "learning_rate": 700.0, "share": 0.1}
    mechanism = ClientLevelDP(whole(privacy__client__adaptive=adaptive), Silent())
    for _ in range(4):
        far = math.copysign(min(2 * mechanism.clip, 1e140), 1) if length else 0.0
        after = mean(mechanism, ZEROS, [reply({"a": np.full(600, far)})] * 9)  # type: ignore[dict-item]
        assert np.isfinite(flat(after)).all()
    assert mechanism.clip == 2.0 ** (direction * 400)


def test_without_adaptive_the_clip_stays(state):
    mechanism = ClientLevelDP(whole(), seeded(0))
    mean(mechanism, state, [reply(moved(state, in_direction(9.0)))])
    assert mechanism.clip == 1.0


def test_a_run_keeps_its_account_where_the_round_loop_finds_it():
    result = outcome(whole(), Clients())
    assert isinstance(result.run, Run) and result.run.client_privacy is not None
    assert result.rounds()[-1]["privacy"] == {"client": {"epsilon": result.run.client_privacy.epsilon}}
