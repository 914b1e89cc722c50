"""Real processes over loopback: one server and its clients, as a user starts them."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors import numpy as safetensors
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from client.account.entries import Entry, cost_of_run
from client.account.ledger import Ledger
from cloister.models import load
from common.certificates import identity
from common.model.weights import initial_weights
from tests.integration.federation import NAMES, Federation, Process
from tests.support import PRIVATE, recomputed, table
from tests.support import federation as small

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def output(process: Process, code: int = 0) -> str:
    """What the process printed, once it has ended with `code`."""
    return process.output(code)


def test_a_private_federation_from_first_hello_to_last_goodbye(federation):
    whole = {"epsilon": 8.0, "delta": 0.1, "clip": 1.0, "clients": 4}
    fed = federation(**{**PRIVATE, "privacy__client": whole}, training__rounds=6)  # both units
    table(seed=9).write_csv(fed.folder / "held.csv")
    server = fed.serve("--held-out", "held.csv")
    clients = [fed.start("join", fed.client_file(name)) for name in NAMES[:2]]
    assert _health(fed) == health_pb2.HealthCheckResponse.SERVING
    served = output(server)
    told = [output(client) for client in clients]

    result = fed.result()
    assert (result["status"], result["rounds"], result["clients"]) == ("completed", 6, ["ada", "ben"])
    assert all(0 < e <= 4.0 for e in result["privacy"]["row"]["per_client"].values())
    assert max(result["privacy"]["row"]["per_client"].values()) < result["privacy"]["row"]["epsilon"] <= 4.0
    layers = {f"layers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert set(load_file(fed.run / "model.safetensors")) == layers
    assert "completed after 6 rounds" in served
    for text in told:
        assert "device cpu" in text
        assert f"fingerprint {fed.event(lambda e: e['event'] == 'start', server)['federation']}" in text
        assert "the run is over: completed" in text

    # Charged before it left, once, and what was acknowledged is not kept.
    for name in NAMES[:2]:
        ledger = Ledger(fed.folder / "state" / name / f"{name}.ledger")
        entries = ledger.entries()
        ledger.close()
        assert [e.mechanism for e in entries] == ["geometric"] + 8 * ["gaussian"]
        assert {e.attempt for e in entries} == {1}
        assert result["privacy"]["row"]["per_client"][name] >= cost_of_run(entries, 1e-3) - 1e-9
        kept = (fed.folder / "state" / name / f"{name}.outbox").rglob("*")
        assert [path for path in kept if path.is_file()] == []

    # The server's own noise for whole clients: charged for all rounds, and from no seed.
    statement = json.loads((fed.run / "privacy.json").read_text())
    updates, counts = statement["client"]["released"]
    assert (updates["steps"], counts["steps"]) == (6, 2)
    assert statement["client"]["noise"].startswith("AES-256")
    assert 7.8 < result["privacy"]["client"]["epsilon"] <= 8.0

    # No exact number of a client is anywhere at the server.
    rounds = [e for e in fed.events() if e["event"] == "round"]
    assert [e["train"]["loss"] for e in rounds] == [None] * 6
    assert [0 <= e["held_out"]["accuracy"] <= 1 for e in rounds] == [True] * 6
    assert ["evaluation" in e for e in rounds] == [False, False, True] * 2
    sizes = {c["released"][0]["told"] for c in statement["row"]["per_client"].values()}
    exact = {int(n) for text in told for n in re.findall(r"(\d+) to train on, (\d+) to validate", text)[0]}
    seen = served + json.dumps(fed.events()) + (fed.run / "privacy.json").read_text()
    for number in exact - sizes:
        # As a number by itself: fingerprints and the run's name have digits of their own.
        assert not re.search(rf"(?<![\w.]){number}(?![\w.])", seen), f"the exact count {number} was told"


def test_a_federation_that_no_budget_covers_any_more_says_so_also_when_it_is_quiet(federation):
    fed = federation(**PRIVATE, training__rounds=2)
    policy = {"epsilon": 5.0, "delta": 2e-3}  # enough for one federation of epsilon 4
    server = fed.serve("--quiet")
    files = [fed.client_file(name, policy=policy) for name in NAMES[:2]]
    for client in [fed.start("join", file) for file in files]:
        client.output()
    assert "completed after 2 rounds" in server.output()
    # The second server finds its clients waiting for it: how long they take to start is not what is tried.
    clients = [fed.start("join", file) for file in files]
    for client in clients:
        client.until("no server at")
    fed.run = fed.folder / "second"
    server = fed.serve("--quiet", "--wait", "15", "--address", fed.address)
    served, told = server.output(), [client.output(2) for client in clients]
    reason = "the clients that are left are fewer than min_clients, because budgets are spent: ada, ben"
    result = fed.result()
    assert (result["status"], result["reason"]) == ("budget_exhausted", reason)
    assert result["refused"] == {"ada": "budget_exhausted", "ben": "budget_exhausted"}
    refused = [(e["client"], e["kind"], e["reason"]) for e in fed.events() if e["event"] == "refused"]
    covers = "the data owner's privacy budget does not cover this run"
    assert sorted(refused) == [(name, "budget_exhausted", covers) for name in ("ada", "ben")]
    assert "budget exhausted after 0 rounds" in served and "budgets are spent: ada, ben" in " ".join(served.split())
    # The numbers are the owner's alone.
    assert all(re.search(r"policy\.epsilon: 5 at delta 0\.002, of which \d\.\d+ is", text) for text in told)
    assert not re.search(r"epsilon: 5|is left|is spent", served + json.dumps(fed.events()))


def _health(fed: Federation) -> int:
    material = identity.load(fed.certs / "ca.pem", fed.certs / "ada.pem", fed.certs / "ada.key")
    credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.certificate)
    with grpc.secure_channel(fed.address, credentials) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status


def test_a_killed_private_client_comes_back_to_the_plan_it_had(federation):
    fed = federation(**PRIVATE, training__rounds=60, privacy__evaluation__every=30)
    fed.address = _free_address()
    ben = fed.start("join", fed.client_file("ben"), "--wait", "60")
    ben.until("no server at")  # it waits; only now is there one
    server = fed.serve("--address", fed.address)
    ada = fed.start("join", fed.client_file("ada"))
    fed.event(lambda e: e["event"] == "round" and e["round"] >= 3, server)
    ada.kill()
    ada.wait()
    path = fed.folder / "state/ada/ada.ledger"
    before = _updates(path)
    assert len(before) >= 3
    again = fed.start("join", fed.client_file("ada"))
    output(server)
    assert "the run is over" in output(again)
    assert "the run is over" in output(ben)
    after = _updates(path)
    assert len({(e.noise_multiplier, e.sampling_rate, e.steps, e.run) for e in after}) == 1
    tasks = {e.task for e in after}
    assert len(before) < len(tasks) <= 60
    assert len(after) <= len(tasks) + 1  # the round in which it was killed may have been charged twice: a spare attempt
    assert fed.result()["privacy"]["row"]["epsilon"] <= 4.0


def _updates(path: Path) -> list[Entry]:
    ledger = Ledger(path)
    entries = [e for e in ledger.entries() if e.part == "train" and e.mechanism == "gaussian"]
    ledger.close()
    return entries


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_interrupting_the_server_saves_the_run_and_frees_the_clients(federation):
    fed = federation(training__rounds=5000)
    server = fed.serve()
    clients = [fed.start("join", fed.client_file(name)) for name in NAMES[:2]]
    fed.event(lambda e: e["event"] == "round" and e["round"] >= 2, server)
    server.send_signal(signal.SIGINT)
    text = output(server, 130)
    assert "Traceback" not in text
    assert fed.result()["status"] == "stopped"
    assert fed.result()["rounds"] >= 2
    assert load_file(fed.run / "model.safetensors")
    for client in clients:
        assert "the run is over: stopped" in output(client)


def test_interrupting_a_client_is_clean_and_the_others_go_on(federation):
    fed = federation(training__rounds=5000, training__local_steps=5, strategy__min_clients=1)
    server = fed.serve()
    ada, ben, cyd = (fed.start("join", fed.client_file(name)) for name in NAMES)
    fed.event(lambda e: e["event"] == "round" and e["clients"] == 3, server)
    for client, number in ((ada, signal.SIGINT), (ben, signal.SIGTERM)):
        client.send_signal(number)
        text = output(client, 130)
        assert "left the federation" in text
        assert "Traceback" not in text
    last = fed.events()[-1]["round"]
    fed.event(lambda e: e["event"] == "round" and e["round"] > last and e["clients"] == 1, server)
    server.send_signal(signal.SIGINT)
    output(server, 130)
    assert "the run is over: stopped" in output(cyd)


def test_a_client_that_will_not_or_cannot_take_part_says_why(federation):
    fed = federation()  # without privacy
    server = fed.serve()
    strict = fed.client_file("ada", policy={"epsilon": 8.0, "delta": 1e-3})
    (fed.folder / "ben.csv").write_text("a,b,c,y\n0.1,secret-cell,red,1\n")
    ada, ben = fed.start("join", strict), fed.start("join", fed.client_file("ben"))
    assert re.search(r"error: policy\.without_privacy is false", output(ada, 2))
    # The owner sees the cell; the server learns only that there is something to see.
    assert "error: ben.csv: 1 cell does not fit the schema:\n  line 2: b: expected a number" in output(ben, 2)
    server.send_signal(signal.SIGINT)  # nobody else will come
    served = output(server, 130)
    assert "ada refuses to take part: policy.without_privacy is false" in served
    assert "ben could not join: the client could not open its data" in served
    assert "secret-cell" not in served
    assert (fed.result()["status"], fed.result()["rounds"]) == ("stopped", 0)


def test_a_server_that_is_not_there_is_waited_for_and_then_given_up(federation):
    fed = federation()
    fed.address = _free_address()
    text = output(fed.start("join", fed.client_file("ada"), "--wait", "1"), 2)
    assert f"no server at {fed.address}" in text
    assert "waiting up to 1 s" in text
    assert re.search(r"error: .*no server within 1 s", text)


def test_a_port_in_use_is_one_clear_line_and_leaves_no_run_folder(federation):
    fed = federation()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = output(fed.start("serve", fed.document, "--address", address, "--insecure", "--out", fed.run), 2)
    assert f"error: {address}: cannot be served; the port is in use" in text
    assert "Traceback" not in text
    assert not fed.run.exists()


def test_every_client_has_the_model_in_the_end_and_who_was_away_fetches_it(federation):
    fed = federation(training__rounds=4, **PRIVATE)
    server = fed.serve("--stay", "--track", "tensorboard")
    ada, ben = (fed.start("join", fed.client_file(name)) for name in NAMES[:2])
    for name, client in zip(NAMES, (ada, ben), strict=False):
        told = output(client)
        assert f"the model after round 4 is kept: {fed.folder / 'state' / name / f'{name}.models'}" in told
    server.until("clients can fetch its model until Ctrl-C")
    assert "completed after 4 rounds" in server.text and (fed.run / "report.html").exists()
    tracked = EventAccumulator(str(fed.run / "tensorboard")).Reload()
    assert [told.step for told in tracked.Scalars("epsilon/row")] == [1, 2, 3, 4]

    away = fed.client_file("cyd")
    assert "after round 4 is kept: " in output(fed.start("fetch", away))
    server.send_signal(signal.SIGINT)
    assert "completed after 4 rounds" in output(server)

    refused = output(fed.start("fetch", away), 2)
    assert "no answer" in refused and "Traceback" not in refused
    assert "`cloister serve --resume RUN_DIR --stay`" in refused
    again = fed.stay()
    again.until("clients can fetch its model until Ctrl-C")
    assert "after round 4 is kept: " in output(fed.start("fetch", fed.client_file("ada")))
    again.send_signal(signal.SIGTERM)
    output(again)

    # Each predicts as the run folder does, and knows what it stated itself and of no other client.
    output(fed.start("predict", fed.run, "cyd.csv", "-o", "run.csv"))
    newest = max((fed.run / "checkpoint").iterdir())
    output(fed.start("predict", newest, "cyd.csv", "-o", "checkpoint.csv"))
    assert (fed.folder / "checkpoint.csv").read_text() == (fed.folder / "run.csv").read_text()
    for name in NAMES:
        output(fed.start("predict", f"{name}.yaml", "cyd.csv", "-o", f"{name}.out.csv"))
        assert (fed.folder / f"{name}.out.csv").read_text() == (fed.folder / "run.csv").read_text()
        model = load(fed.folder / f"{name}.yaml")
        stated = {name} if name != "cyd" else set()
        assert set(model.privacy["row"]["per_client"]) == stated
        assert model.privacy["row"]["epsilon"] == fed.result()["privacy"]["row"]["epsilon"]


def test_real_clients_train_by_what_the_toolbox_offers(federation):
    targets: dict[str, Any] = {  # a column that is no feature, and one that these tables do not have
        "schema__features": [{"name": name, "type": "numeric", "bounds": [-1, 1]} for name in "ab"],
        "schema__also": [
            {"name": "c", "classes": ["red", "green"], "weight": 0.5},
            {"name": "size", "bounds": [0, 9], "optional": True},
        ],
    }
    first = initial_weights(small(**targets, model__hidden=[8, 5]), seed=4)
    data = safetensors.save(first)
    fed = federation(
        **PRIVATE,
        **targets,
        model__hidden=[8, 5],
        start={"sha256": hashlib.sha256(data).hexdigest(), "frozen": [0]},
        training__rounds=4,
        training__schedule={"name": "cosine", "over": "steps", "warmup": 1},
        training__augmentation={"copies": 3, "jitter": 0.1, "drop": 0.1},
        schema__group={"name": "a", "cuts": [0], "calibration": True},
        strategy__schedule={"name": "plateau", "metric": "accuracy", "patience": 1},
        strategy__average=0.8,
    )
    (fed.folder / "first.safetensors").write_bytes(data)
    without = fed.start("serve", fed.document, "--certificates", fed.certs)
    assert "begins from the model with SHA-256" in output(without, 2)
    server = fed.serve("--start-from", "first.safetensors")
    for client in [fed.start("join", fed.client_file(name)) for name in NAMES[:2]]:
        output(client)
    output(server)
    model = load(fed.run)
    for name, array in model.weights.items():
        assert np.array_equal(array, first[name]) == name.startswith("layers.0")
    for name in NAMES[:2]:  # who have the average, which is what the run left
        kept = load(fed.folder / f"{name}.yaml")
        assert all(np.array_equal(kept.weights[key], array) for key, array in model.weights.items())
    evaluation = json.loads((fed.run / "result.json").read_text())["evaluation"]
    assert list(evaluation["by"]["a"]["groups"]) == ["below 0", "from 0", "(other)"]
    assert "c" in evaluation["tasks"]
    statement = json.loads((fed.run / "privacy.json").read_text())
    assert statement["start"]["sha256"] == hashlib.sha256(data).hexdigest()
    for client in statement["row"]["per_client"].values():
        assert client["epsilon"] == pytest.approx(recomputed(client), rel=0.01)
        assert client["epsilon"] <= 4.0


@pytest.mark.parametrize("private", [False, True], ids=["without privacy", "with privacy"])
def test_real_clients_measure_energy_and_tell_the_server_only_without_privacy(federation, private):
    fed = federation(energy=True, **(PRIVATE if private else {}))
    server = fed.serve()
    for client in [fed.start("join", fed.client_file(name)) for name in NAMES[:2]]:
        assert re.search(r"run \S+ took [0-9.]+ \S?J, [0-9.]+ \S?g CO2e in 3 rounds, about; ", output(client))
    assert ("energy of clients" in output(server)) == (not private)
    result = json.loads((fed.run / "result.json").read_text())
    books = [json.loads(path.read_text()) for path in sorted(fed.folder.glob("**/*.energy.json"))]
    own = [took["joules"] for book in books for took in book.values()]
    assert len(own) == 2 and min(own) > 0
    if private:
        assert "energy" not in result and "joules" not in (fed.run / "events.jsonl").read_text()
    else:
        assert result["energy"]["joules"] == pytest.approx(sum(own))


def test_a_model_is_fetched_while_the_run_goes_on(federation):
    private = {"row": {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0}, "evaluation": {"every": 0}}
    fed = federation(training__rounds=2000, privacy=private)
    server = fed.serve()
    clients = [fed.start("join", fed.client_file(name)) for name in NAMES[:2]]
    fed.round_after(2, server)
    told = output(fed.start("fetch", fed.client_file("cyd")))
    assert re.search(r"the model of small after round \d+ is kept: ", told)
    model = load(fed.folder / "cyd.yaml")
    assert model.round >= 2 and model.run == fed.event(lambda e: e["event"] == "start", server)["run"]
    server.send_signal(signal.SIGINT)
    assert "report: " in output(server, 130)
    for client in clients:
        assert "is kept: " in output(client)
