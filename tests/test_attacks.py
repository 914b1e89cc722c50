"""Attacks on honesty: what a server, a crash or a careless owner might do to get more out of a table than its budget.

Each fails when its defence is removed. Those that need a client's whole inner life stand here, the others beside the
room that defends:

    the client is restarted at round k              here; test_federation: a killed client (a real process)
    ... killed between charge and send              here
    ... killed before the charge                    here
    ... killed at any time                          integration/test_kills (a real process)
    a task is replayed, a round sent again          client/test_node: sent again byte for byte and charged once
    ... after it was acknowledged                   client/test_node: charged again
    more steps, less noise, a larger clip, a seed   client/test_node: what a server writes beside the task
    another schema, another federation              here; client/test_node: after a reconnection
    rounds beyond the plan                          client/test_node: beyond the plan
    two federations, two runs, on one dataset       client/test_budget: a second federation; runs that take turns
    a dataset's file renamed, or grown              here
    a corrected cell that moves a row               here; client/test_budget: the parts' costs are added
    a document that asks a question of the table    client/test_node: says nothing about its rows; after three
    many runs, many names                           client/test_node: max_rounds; client/test_site: the authority
    escape codes                                    client/test_node: move the owner's cursor; client/test_account
    a changed or an equal seed                      client/test_node: a real client's noise; server/test_central
    an empty Poisson batch                          client/test_training: takes its noisy step
    one row                                         here; client/test_training: the noise that is charged
    a delta above 1 / rows                          client/test_budget
    a clock that is set back                        client/test_ledger; client/test_policy
    NaN and infinite gradients                      client/test_training, test_kernel: counts as 0
    a ledger cut off, rewritten, restored, shared   here; client/test_ledger
    a full disk                                     client/test_ledger
    a reply larger than the clip                    server/test_central
    unequal weights, a lying weight                 server/test_central
    a missing reply                                 server/test_central
    a model that is not finite                      here
    a last model of another run, or none at all     client/test_node_models: leaves the one before
    bits of a noisy number that tell what it hides  here: counts, updates; server/test_central
    weights that let a batch's size move every row  here; client/test_kernel: let the order of adding decide
    a label's shape that mixes rows                 here; client/test_kernel
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import app as client_apps
from client.account.entries import Entry, cost_of_run, spent
from client.account.ledger import Ledger
from client.account.policy import Policy
from client.app import client_app
from client.settings import ClientFile, DataFile
from client.site import Site, open_site
from client.training import dpsgd as private_training
from client.training import kernel
from client.training.recipe import DPSGD
from client.training.train import noisy_counts
from common.document.federation import Federation
from common.errors import ConfigError, LedgerError, Refusal
from common.model import mlp, objective
from common.model.weights import Weights
from common.privacy import noise
from common.wire import records
from common.wire.records import ARRAYS, BUDGET_EXHAUSTED, CONFIG, REFUSED, RUN
from simulations.inline import InlineGrid
from tests.support import PRIVATE, ROOT, federation, table

FED = federation(**PRIVATE)


def site(
    folder: Path,
    fed: Federation = FED,
    *,
    file: str = "ada.csv",
    epsilon: float = 8.0,
    head: Path | None = None,
    policy: Policy | None = None,
    arithmetic: Any = "exact",
    person: str | None = None,
) -> Site:
    """A real participant, with its ledger on disk."""
    if not (folder / file).exists():
        table().write_csv(folder / file)
    settings = ClientFile(
        server="localhost:1",
        tls=None,
        name="ada",
        data=DataFile(path=str(folder / file), name="ada", id=person),
        device="cpu",
        state=str(folder / "state"),
        head=str(head) if head else None,
        policy=policy or Policy(epsilon=epsilon, delta=1e-3),
        arithmetic=arithmetic,
    )
    return open_site(settings, fed, name="ada")


def train(
    at: Site,
    server_round: int,
    *,
    fed: Federation | None = None,
    state: Weights | None = None,
    run: str = "run",
    kind: str = "train",
) -> Message:
    """One round of training, or another kind of task, as a server would ask for it."""
    document = fed or at.federation
    grid = InlineGrid(client_app(lambda context: nullcontext(at)), [1], run=run)
    arrays = records.from_weights(state or mlp.weights_of(mlp.build(document)))
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({RUN: run})})
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, 1, f"{server_round}")])
    return reply


def updates(folder: Path) -> list[Entry]:
    ledger = Ledger(folder / "state" / "ada.ledger")
    found = [e for e in ledger.entries() if e.mechanism == "gaussian"]
    ledger.close()
    return found


def dying(folder: Path, where: str) -> None:
    """A client process that is killed in its second round. Runs in a process of its own."""

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    at = site(folder)
    assert not train(at, 1).has_error()
    if where == "after the charge":
        private_training.fit_privately = die  # type: ignore[assignment]
    else:
        Ledger.charge = die  # type: ignore[assignment, method-assign]
    train(at, 2)


@pytest.mark.parametrize("where, charged", [("after the charge", 2), ("before the charge", 1)])
def test_a_client_that_is_killed_in_a_round_has_paid_for_whatever_could_have_left(tmp_path, where, charged):
    code = f"from pathlib import Path; from tests.test_attacks import dying; dying(Path({str(tmp_path)!r}), {where!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(updates(tmp_path)) == charged
    again = site(tmp_path)
    assert not train(again, 2).has_error()  # with the plan, and so the noise, that it had
    budget = again.account.budget("run")
    assert budget is not None and budget.rounds_charged == charged + 1
    again.account.close()
    entries = updates(tmp_path)
    assert len({(e.noise_multiplier, e.sampling_rate, e.steps) for e in entries}) == 1
    assert [e.attempt for e in entries] == ([1, 1, 2] if charged == 2 else [1, 1])


def test_a_client_that_is_restarted_after_each_round_pays_as_one_that_never_was(tmp_path):
    stated = []
    for server_round in (1, 2, 3):
        at = site(tmp_path)
        reply = train(at, server_round)
        stated.append(float(reply.content["privacy"]["epsilon"]))  # type: ignore[arg-type]
        at.account.close()
    at = site(tmp_path)
    fourth = train(at, 4)
    assert fourth.error.code == BUDGET_EXHAUSTED
    entries = at.account.books.ledger.entries()
    at.account.close()
    assert stated == sorted(set(stated))
    assert stated[-1] == pytest.approx(cost_of_run(entries, 1e-3))
    assert 3.2 < stated[-1] <= 4.0  # what is left of 4 was planned for spare attempts, of which none was needed


def test_what_is_sent_is_trained_with_the_noise_that_was_charged(tmp_path, monkeypatch):
    ran: list[DPSGD] = []
    fit = private_training.fit_privately

    def listening(*args: Any, dpsgd: DPSGD, **kwargs: Any) -> None:
        ran.append(dpsgd)
        fit(*args, dpsgd=dpsgd, **kwargs)

    monkeypatch.setattr(private_training, "fit_privately", listening)
    at = site(tmp_path)
    for server_round in (1, 2):
        train(at, server_round)
    at.account.close()
    charged = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in updates(tmp_path)]
    assert [(d.noise_multiplier, d.sampling_rate, d.steps) for d in ran] == charged
    assert {d.clip for d in ran} == {1.0}


@pytest.mark.parametrize(
    "other",
    [
        federation(**PRIVATE, name="other"),
        federation(**{**PRIVATE, "privacy__row__epsilon": 7.9}),
        federation(**{**PRIVATE, "privacy__row__clip": 99.0}),
        federation(**PRIVATE, training__local_steps=50),
        federation(**PRIVATE, schema__validation_fraction=0.01),
    ],
    ids=["name", "epsilon", "clip", "steps", "schema"],
)
def test_a_run_that_was_begun_with_one_document_does_not_go_on_with_another(tmp_path, other):
    at = site(tmp_path)
    train(at, 1)
    at.account.close()
    with pytest.raises(Refusal, match="run run was planned here for another federation"):
        changed = site(tmp_path, other)
        try:
            changed.account.budget("run")
        finally:
            changed.account.close()
    assert len(updates(tmp_path)) == 1


PLAIN = federation(training__rounds=9)


@pytest.mark.parametrize(
    "rules, fed, rounds, said",
    [
        ({"max_rounds": 9}, PLAIN, 10, "policy.max_rounds: asked 10, allowed 9"),
        (
            {"max_local_steps": 5},
            federation(training__local_steps=..., training__local_epochs=1),
            1,
            r"policy\.max_local_steps: asked \d+, allowed 5$",
        ),
        ({"min_seconds_between_rounds": 3600}, PLAIN, 2, "policy.min_seconds_between_rounds: asked a round at"),
    ],
)
def test_the_owners_rules_hold_without_privacy_too_and_exact_releases_are_not_forgotten(
    tmp_path, rules, fed, rounds, said
):
    policy = Policy(epsilon=8.0, delta=1e-3, without_privacy=True, **rules)
    at = site(tmp_path, fed, policy=policy)
    for server_round in range(1, rounds):
        assert not train(at, server_round).has_error()
    reply = train(at, rounds)
    assert reply.error.code == REFUSED
    assert re.match(said, reply.error.reason or "")
    assert [e.mechanism for e in at.account.books.ledger.entries()] == ["none"] * (rounds - 1)
    at.account.close()


def test_exact_counts_do_not_leave_where_evaluations_may_not(tmp_path):
    policy = Policy(epsilon=8.0, delta=1e-3, without_privacy=True, releases=("model", "row_count"))
    at = site(tmp_path, PLAIN, policy=policy)
    reply = train(at, 1, kind="evaluate")
    assert reply.error.reason == "policy.releases: asked evaluation, allowed model, row_count"
    assert at.account.books.ledger.count() == 0
    at.account.close()


def test_whoever_submits_a_run_does_not_choose_the_owners_client_file(monkeypatch):
    monkeypatch.delenv("CLOISTER_CLIENT_FILE", raising=False)
    chosen = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"client-file": "theirs.yaml"})
    with pytest.raises(ConfigError, match="client-file: not in the node's configuration"):
        client_apps._setting(chosen, "client-file", by_run=False)
    own = Context(run_id=1, node_id=1, node_config={"client-file": "o.yaml"}, state=RecordDict(), run_config={})
    assert client_apps._setting(own, "client-file", by_run=False) == "o.yaml"


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex64", "float16"])
def test_a_model_of_another_type_is_refused_before_anything_is_charged(tmp_path, dtype):
    # 1e300 is finite, and infinite once it is a float32.
    state = {name: np.full(array.shape, 1, dtype) for name, array in mlp.weights_of(mlp.build(FED)).items()}
    if dtype == "float64":
        state["layers.0.bias"][0] = 1e300
    at = site(tmp_path)
    reply = train(at, 1, state=state)  # type: ignore[arg-type]
    at.account.close()
    assert reply.error.code == REFUSED
    assert updates(tmp_path) == []


def test_a_model_of_another_shape_is_refused_before_anything_is_charged(tmp_path):
    at = site(tmp_path)
    reply = train(at, 1, fed=federation(**PRIVATE, model__hidden=[9]))
    assert reply.error.code == REFUSED
    at.account.close()
    assert updates(tmp_path) == []


def test_a_state_folder_that_was_restored_whole_is_found_by_a_head_kept_elsewhere(tmp_path):
    far = tmp_path / "other disk" / "ada.head"
    at = site(tmp_path, head=far)
    train(at, 1)
    at.account.close()
    shutil.copytree(tmp_path / "state", tmp_path / "backup")
    at = site(tmp_path, head=far)
    train(at, 2)
    at.account.close()
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "backup").rename(tmp_path / "state")
    with pytest.raises(LedgerError, match=r"has 2 entries, but has had 3, says .*other disk/ada\.head: its end was"):
        site(tmp_path, head=far)


def test_a_file_that_was_renamed_or_has_grown_is_the_same_account(tmp_path):
    at = site(tmp_path)
    for server_round in (1, 2, 3):
        train(at, server_round)
    before = spent(at.account.books.ledger.entries(), 1e-3)
    at.account.close()
    pl.concat([table(), table(50, seed=9)]).write_csv(tmp_path / "renamed.csv")
    again = site(tmp_path, file="renamed.csv", epsilon=20.0)
    assert not train(again, 1, run="second").has_error()
    entries = again.account.books.ledger.entries()
    again.account.close()
    assert before < spent(entries, 1e-3) <= 20.0
    strict = site(tmp_path, file="renamed.csv", epsilon=6.0)
    assert train(strict, 1, run="third").error.code == BUDGET_EXHAUSTED
    assert strict.account.books.ledger.entries() == entries
    strict.account.close()
    assert len({e.content for e in entries}) == 2  # and the change does not go unnoticed


def train_correct_a_cell_and_evaluate(folder: Path, *, person: str | None) -> list[Entry]:
    """What is charged, in two runs."""
    fed = federation(**{**PRIVATE, "privacy__evaluation": {"every": 1, "noise": 3.0}})
    rows = table().with_columns(patient=pl.int_range(200))
    rows.write_csv(folder / "ada.csv")
    at = site(folder, fed, epsilon=30.0, person=person)
    for server_round in (1, 2, 3):
        assert not train(at, server_round, run="one").has_error()
    at.account.close()
    corrected = rows.with_columns(pl.when(pl.int_range(pl.len()) == 0).then(0.123456).otherwise(pl.col("a")).alias("a"))
    corrected.write_csv(folder / "ada.csv")
    at = site(folder, fed, epsilon=30.0, person=person)
    assert not train(at, 1, run="two", kind="evaluate").has_error()
    entries = at.account.books.ledger.entries()
    at.account.close()
    assert {e.split for e in entries if e.mechanism == "gaussian"} == {entries[-1].split}
    return entries


def test_a_corrected_cell_does_not_let_a_person_pay_for_one_part_only(tmp_path):
    # The row of a person whose cell was corrected may be dealt to the other part: then that person is in both.
    entries = train_correct_a_cell_and_evaluate(tmp_path, person=None)
    parts = [spent([e for e in entries if e.part == part], 1e-3) for part in ("train", "validation")]
    assert spent(entries, 1e-3) == spent([replace(e, part="train") for e in entries], 1e-3) > max(parts)


def test_a_person_whose_rows_are_dealt_by_an_identifier_stays_in_one_part_and_pays_for_it(tmp_path):
    entries = train_correct_a_cell_and_evaluate(tmp_path, person="patient")
    parts = [spent([e for e in entries if e.part == part], 1e-3) for part in ("train", "validation")]
    assert len({e.content for e in entries}) == 2
    assert spent(entries, 1e-3) == max(parts)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_refused_before_anything_is_charged(tmp_path, bad, kind):
    state = mlp.weights_of(mlp.build(FED))
    state["layers.0.bias"][3] = bad
    at = site(tmp_path)
    reply = train(at, 1, state=state, kind=kind)
    at.account.close()
    assert (reply.error.code, reply.error.reason) == (REFUSED, "the weights that were sent are not finite")
    assert updates(tmp_path) == []


@pytest.mark.parametrize("size", [3e38, 1e-45])
def test_a_model_of_the_largest_or_smallest_numbers_is_charged_like_any_other(tmp_path, size):
    state = {name: np.full_like(array, size) for name, array in mlp.weights_of(mlp.build(FED)).items()}
    at = site(tmp_path)
    reply = train(at, 1, state=state)
    at.account.close()
    assert not reply.has_error()
    (entry,) = updates(tmp_path)
    assert (entry.steps, entry.attempt) == (2, 1)


def test_one_row_is_trained_on_and_charged_like_many(tmp_path):
    row = {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0, "count_epsilon": None, "sampling_rate": 0.1}
    fed = federation(
        **{**PRIVATE, "privacy__row": row, "schema__validation_fraction": 0, "privacy__evaluation__every": 0}
    )
    table(1).write_csv(tmp_path / "ada.csv")
    one = site(tmp_path, fed)
    reply = train(one, 1)
    plan = one.account.budget("run")
    one.account.close()
    many = tmp_path / "many"
    many.mkdir()
    big = site(many, fed)
    train(big, 1)
    other = big.account.budget("run")
    big.account.close()
    assert plan is not None and other is not None
    assert plan.plan == other.plan  # nothing that is told depends on there being only one
    assert plan.statement() == other.statement()
    assert not reply.has_error()


# What leaves is a function of integers


NUMBER = {
    "schema__target": {"name": "y", "bounds": [0, 1]},
    "training__loss": "mse",
}


@pytest.mark.parametrize("changes", [{}, NUMBER], ids=["classes", "number"])
def test_no_bit_of_an_evaluation_is_finer_than_its_grid(tmp_path, changes):
    # A float's noise keeps, near 0, bits that it loses when it is added to a count of 1: the fine bits told which.
    at = site(tmp_path, federation(**PRIVATE, **changes))
    reply = train(at, 1, kind="evaluate")
    at.account.close()
    told = np.array(reply.content.metric_records["metrics"]["counts"])
    assert (told * 2.0**20 == np.rint(told * 2.0**20)).all()
    assert (told != np.rint(told)).any()  # it has noise


@pytest.mark.parametrize("multiplier", [3.0, 1.0, 3.7])
def test_the_bits_of_a_noisy_count_tell_nothing_beside_its_value(multiplier):
    place, cells = federation(**PRIVATE).data_schema, 100_000
    fine = {}
    for count in (0.0, 1.0):
        told = noisy_counts(np.full(cells, count), place, multiplier, noise.secure())
        fine[count] = int(((np.abs(told) < 0.5) & (told * 2.0**20 != np.rint(told * 2.0**20))).sum())
        # And every number on the grid is met alike: the last bit is a coin.
        odd = (np.rint(told * 2.0**20) % 2).mean()
        assert abs(odd - 0.5) < 5 / np.sqrt(4 * cells)
    assert fine == {0.0: 0, 1.0: 0}
    # The distinguisher works: on noise in floating point it never errs.
    for count, seen in ((0.0, True), (1.0, False)):
        told = count + noise.secure().normal(cells) * multiplier
        assert ((np.abs(told) < 0.5) & (told * 2.0**53 != np.rint(told * 2.0**53))).any() == seen


def fine_numbers(arithmetic: Any, *, present: bool, rounds: int = 6) -> int:
    """How many numbers of some updates have bits that a sum with the target's part in it cannot have.

    The server's units fire for the target's cells alone, so its part of each output weight is +-1 / sqrt(2 hidden) and
    all else is noise. A float32 near 0 has finer bits than one to which that part was added.
    """
    hidden, rows = 2048, 32
    fed = federation(model__hidden=[hidden], training__local_steps=1, training__learning_rate=1.0)
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.uniform(-0.6, 0.6, (rows, fed.layer_sizes[0])).astype(np.float32))
    x[:, 2:] = torch.tensor([1.0, 0.0, 0.0])
    y = torch.from_numpy(rng.integers(0, 2, rows))
    if present:
        x[0], y[0] = torch.tensor([0.9, -0.9, 0.0, 1.0, 0.0]), 1
    state = {name: np.zeros_like(array) for name, array in mlp.weights_of(mlp.build(fed)).items()}
    state["layers.0.weight"][:, [0, 1, 3]] = [100.0, -100.0, 100.0]
    state["layers.0.bias"][:] = -200.0
    part = 1 / np.sqrt(2 * hidden)
    grain = 2.0 ** (np.frexp(part / 2)[1] - 24)
    dpsgd = DPSGD(
        steps=1, sampling_rate=1.0, clip=1.0, noise_multiplier=1.0, expected_batch_size=32, arithmetic=arithmetic
    )
    found, source = 0, noise.secure()
    for _ in range(rounds):
        model = mlp.build(fed)
        mlp.load_weights(model, state)
        private_training.fit_privately(model, x, y, training=fed.training, dpsgd=dpsgd, noise=source, proximal_mu=0.0)
        told = mlp.weights_of(model)["layers.1.weight"].astype(np.float64).ravel() * -32  # powers of two: exact
        found += int(((np.abs(told) <= part / 2) & (told / grain != np.floor(told / grain))).sum())
    return found


def test_the_bits_of_an_update_do_not_tell_whether_a_row_was_in_the_batch():
    assert fine_numbers("exact", present=False) == fine_numbers("exact", present=True) == 0
    # The distinguisher works: in Opacus' floating point they tell it outright.
    assert fine_numbers("opacus", present=False) > 0
    assert fine_numbers("opacus", present=True) == 0


def paired_weights() -> Weights:
    """Hidden units in pairs that are equal, with weights of +-1e20: their sums are 0. What floats leave of them has
    either sign, and depends on the order of adding, and so on the batch's size."""
    hidden = 1024
    fed = federation(model__hidden=[hidden], training__loss="binary_cross_entropy")
    state = {name: np.zeros_like(array) for name, array in mlp.weights_of(mlp.build(fed)).items()}
    rng = np.random.default_rng(0)
    order = rng.permutation(hidden)
    state["layers.0.weight"][order] = np.tile(rng.uniform(-1, 1, (hidden // 2, 5)), (2, 1))
    state["layers.1.weight"][0, order] = np.repeat([1e20, -1e20], hidden // 2)
    return state


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "cross_entropy"])
def test_one_more_row_moves_a_sum_and_a_score_by_its_own_part_whatever_the_weights(loss):
    fed = federation(model__hidden=[1024], model__activation="tanh", training__loss=loss)
    model = mlp.build(fed)
    state = paired_weights()
    if loss == "cross_entropy":
        state["layers.1.weight"] = np.concatenate([state["layers.1.weight"], -state["layers.1.weight"]])
        state["layers.1.bias"] = np.zeros(2, np.float32)
    mlp.load_weights(model, state)
    x, y = torch.full((65, 5), 0.25), torch.zeros(65, dtype=torch.int64)
    net = kernel.ExactMLP(model.weights(), activation="tanh", loss=loss)
    one = net.clipped_sum(x[:1], y[:1], clip=1.0)
    for rows in range(1, 65):
        sums = [net.clipped_sum(x[:n], y[:n], clip=1.0) for n in (rows, rows + 1)]
        assert all(torch.equal(b - a, part) for a, b, part in zip(*sums, one, strict=True))
        less, more = (
            kernel.exact_counts(model, x[:n], y[:n], schema=fed.data_schema, loss=loss) for n in (rows, rows + 1)
        )
        assert np.linalg.norm(more - less) == 1
    for score in (
        lambda labels: net.clipped_sum(x, labels, clip=1.0),
        lambda labels: kernel.exact_counts(model, x, labels, schema=fed.data_schema, loss=loss),
        lambda labels: objective.row_losses(model(x), labels, loss),
    ):
        with pytest.raises(ValueError, match=r"y must have one number for each row, \[65\], got \[65, 1\]"):
            score(y[:, None])


def test_a_client_scores_in_exact_arithmetic(tmp_path):
    # Each logit is exactly 0, so class 0. Floats leave 10^14 or so of it, and for half of the rows above 0.
    noisy = {**PRIVATE, "privacy__row__epsilon": 1e6, "privacy__evaluation__noise": 0.01}
    fed = federation(**noisy, model__hidden=[1024], model__activation="tanh", training__loss="binary_cross_entropy")
    rows = pl.DataFrame({"a": [0.5] * 400, "b": np.linspace(-1, 1, 400), "c": ["red"] * 400, "y": [0] * 400})
    rows.write_csv(tmp_path / "ada.csv")
    at = site(tmp_path, fed, epsilon=1e7)
    reply = train(at, 1, state=paired_weights(), fed=fed, kind="evaluate")
    validation = len(at.dataset.validation_y)
    at.account.close()
    told = np.array(reply.content.metric_records["metrics"]["counts"])
    assert validation > 50
    assert np.abs(told - [validation, 0, 0, 0]).max() < 0.1


@pytest.mark.parametrize("arithmetic, exact", [("exact", 1), ("opacus", 0)])
def test_a_client_states_the_arithmetic_that_it_trained_in(tmp_path, monkeypatch, arithmetic, exact):
    ran: list[str] = []
    fit = private_training.fit_privately

    def listening(*args: Any, dpsgd: DPSGD, **kwargs: Any) -> None:
        ran.append(dpsgd.arithmetic)
        fit(*args, dpsgd=dpsgd, **kwargs)

    monkeypatch.setattr(private_training, "fit_privately", listening)
    at = site(tmp_path, arithmetic=arithmetic)
    reply = train(at, 1)
    at.account.close()
    assert ran == [arithmetic]
    assert reply.content["privacy"]["exact_arithmetic"] == exact
