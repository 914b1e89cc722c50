"""One contract for every strategy that a federation may name."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from common.document import federation as federations
from common.document.federation import Federation
from common.model import mlp
from common.wire import records
from common.wire.identity import identify_process
from common.wire.records import ARRAYS, LOSS, METRICS, WEIGHT
from server.folder.folder import RunFolder, load_model
from server.rounds import strategies
from server.rounds.cohort import CohortGrid
from simulations.engine import simulate
from simulations.inline import InlineGrid
from simulations.sources import sites_from_table
from tests.support import federation

PARAMETERS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"server_learning_rate": 0.5, "server_momentum": 0.7},
    "fedadam": {"eta": 0.03, "beta_1": 0.8, "beta_2": 0.9, "tau": 0.01},
    "fedadagrad": {"eta": 0.04, "tau": 0.02},
    "fedyogi": {"eta": 0.05, "beta_1": 0.7, "beta_2": 0.8, "tau": 0.03},
    "fedprox": {"proximal_mu": 0.6},
    "fedmedian": {},
    "fedtrimmedavg": {"beta": 0.25},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "bulyan": {"num_malicious_nodes": 1},
    "qfedavg": {"q": 0.3},
    "agnostic": {"mixture_rate": 0.4},
}
NAMES = sorted(PARAMETERS)
CLIENTS = 7  # bulyan needs 4 x 1 + 3
START = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float32)}
identify_process("strategies")


def document(name: str, **changes: Any) -> Federation:
    strategy = {"name": name, "min_clients": CLIENTS, "round_timeout": 30, **PARAMETERS[name]}
    return federation(**{"training__rounds": 2, "strategy": strategy} | changes)


def updates(number: int = CLIENTS) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{k: v + rng.normal(size=v.shape).astype(np.float32) for k, v in START.items()} for _ in range(number)]


def aggregate(name: str, states: list[dict[str, np.ndarray]], *, weights: list[float] | None = None) -> ArrayRecord:
    """One round of the strategy, from START, with a reply of each state."""
    nodes = range(1, len(states) + 1)
    grid = CohortGrid(InlineGrid(lambda m, c: m, nodes, run="strategies"), list(nodes))
    strategy = strategies.build(document(name))
    asked = list(strategy.configure_train(1, records.from_weights(START), ConfigRecord(), grid))
    assert sorted(message.metadata.dst_node_id for message in asked) == list(nodes)
    replies = []
    for number, state in enumerate(states):
        metrics = MetricRecord({WEIGHT: weights[number] if weights else 5.0, LOSS: 0.5})
        content = RecordDict({ARRAYS: records.from_weights(state), METRICS: metrics})
        replies.append(Message(content, reply_to=asked[number]))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return arrays


def close(arrays: ArrayRecord, expected: dict[str, np.ndarray], *, atol: float = 1e-6) -> bool:
    return all(np.allclose(arrays[name].numpy(), expected[name], atol=atol) for name in expected)


def simulated(chosen: Federation, where: Path, *, clients: int = CLIENTS) -> tuple[dict[str, Any], dict[str, Any]]:
    sites = sites_from_table(chosen, 40 * clients, clients=clients, how="iid", seed=0, device=torch.device("cpu"))
    folder = RunFolder.create(chosen, path=where)
    return simulate(chosen, sites, folder, run="test"), load_model(folder.path)


def test_every_strategy_that_a_document_may_name_is_covered():
    union = typing.get_args(typing.get_args(federations.StrategyChoice)[0])
    named = {typing.get_args(model.model_fields["name"].annotation)[0] for model in union}
    assert named - {"installed"} == set(strategies.CLASSES) == set(PARAMETERS)  # test_installed.py has that one


@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_of_real_clients_run_and_move_a_float32_model(tmp_path, name):
    result, model = simulated(document(name), tmp_path / "run")
    assert (result["status"], result["rounds"], len(result["clients"])) == ("completed", 2, CLIENTS)
    assert {array.dtype for array in model.values()} == {np.dtype("float32")}
    assert all(np.isfinite(array).all() for array in model.values())
    start = mlp.weights_of(mlp.build(document(name)))
    assert all(not np.array_equal(model[k], start[k]) for k in start)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_replies_changes_nothing_but_rounding(name):
    states, order = updates(), np.random.default_rng(1).permutation(CLIENTS)
    first = aggregate(name, states, weights=list(map(float, range(1, 8))))
    weights = [float(i + 1) for i in order]
    permuted = aggregate(name, [states[i] for i in order], weights=weights)
    assert close(permuted, {k: v.numpy() for k, v in first.items()}, atol=1e-5)


# Krum, multi-Krum and Bulyan need several replies to compare.
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedmedian", "fedtrimmedavg", "qfedavg", "agnostic"])
def test_the_update_of_one_client_alone_is_the_new_model(name):
    (state,) = updates(1)
    # q-FedAvg divides by L + q |L (w - w_k)|^2 / loss, with L = 1 / learning rate: only with q = 0 is it the mean.
    chosen = document(name, **({"strategy__q": 0.0} if name == "qfedavg" else {}))
    strategy = strategies.build(chosen)
    grid = InlineGrid(lambda m, c: m, [1], run="strategies")
    (asked,) = strategy.configure_train(1, records.from_weights(START), ConfigRecord(), grid)
    content = RecordDict({ARRAYS: records.from_weights(state), METRICS: MetricRecord({WEIGHT: 5.0, LOSS: 0.5})})
    arrays, _ = strategy.aggregate_train(1, [Message(content, reply_to=asked)])
    assert arrays is not None
    assert close(arrays, state)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi", "fedprox", "fedmedian"])
def test_a_federation_of_one_client_runs(tmp_path, name):
    result, _ = simulated(document(name, strategy__min_clients=1), tmp_path / "run", clients=1)
    assert (result["status"], result["clients"]) == ("completed", ["client-0"])


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_parameters_reach_flowers_strategy(name):
    strategy = strategies.build(document(name))
    assert {key: getattr(strategy, key) for key in PARAMETERS[name]} == PARAMETERS[name]


def test_the_mean_is_weighted_by_rows():
    arrays = aggregate("fedavg", [{"w": START["w"], "b": np.full(3, v, np.float32)} for v in (1, 5)], weights=[30, 10])
    assert np.allclose(arrays["b"].numpy(), 2.0)  # (30 x 1 + 10 x 5) / 40


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"])
def test_a_robust_strategy_is_not_moved_far_by_one_client_that_lies(name):
    states = updates()
    states[3] = {name: np.full_like(array, 1e6) for name, array in START.items()}
    assert all(np.abs(array.numpy()).max() < 10 for array in aggregate(name, states).values())
    assert np.abs(aggregate("fedavg", states)["b"].numpy()).max() > 1e5  # what they guard against


def test_fedproxs_term_holds_local_training_back(tmp_path):
    def distance(mu: float) -> float:
        chosen = document("fedprox", strategy__proximal_mu=mu, training__rounds=1, training__local_steps=20)
        _, model = simulated(chosen, tmp_path / f"{mu}")
        start = mlp.weights_of(mlp.build(chosen))
        return float(sum(((model[k] - start[k]) ** 2).sum() for k in model) ** 0.5)

    free, held, tight = (distance(mu) for mu in (1e-9, 1.0, 5.0))
    assert tight < held < free
    assert tight < 0.5 * free


def test_qfedavg_weighs_by_the_loss_that_clients_send():
    # One number, q = 1, learning rate 0.1 so L = 10. Clients at 1 and -1 with losses 3 and 1, from 0:
    # delta = loss x L x (0 - w_k) = -30, 10;  h = L^2 w_k^2 + L x loss = 100 + 30, 100 + 10
    # new = 0 - (-30 + 10) / (130 + 110) = 20 / 240
    chosen = document("qfedavg", strategy__q=1.0, training__learning_rate=0.1)
    strategy = strategies.build(chosen)
    grid = InlineGrid(lambda m, c: m, [1, 2], run="strategies")
    zero = {"w": np.zeros(1, np.float32)}
    asked = list(strategy.configure_train(1, records.from_weights(zero), ConfigRecord(), grid))
    replies = []
    for message, value, loss in zip(asked, (1, -1), (3.0, 1.0), strict=True):
        state = {"w": np.full(1, value, np.float32)}
        content = RecordDict({ARRAYS: records.from_weights(state), METRICS: MetricRecord({WEIGHT: 5.0, LOSS: loss})})
        replies.append(Message(content, reply_to=message))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert arrays["w"].numpy() == pytest.approx(20 / 240)
