"""Real processes that are killed, cut off, starved and lied to. What must hold after each fault: the model is that of
a run without it, but for the replies that were truly lost; what was released is charged, and charged once if it was
kept; the run ends, or goes on, by itself.

Clients without privacy are deterministic here: each step is one batch of all their rows. So the model that must come
out is known from a run of the same rounds in this process, over no network.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from numpy.testing import assert_allclose
from safetensors import safe_open
from safetensors.numpy import load_file

from client import data
from client.account.account import Account
from client.account.books import Books
from client.account.ledger import Ledger
from client.account.policy import Policy
from client.app import client_app
from client.device import resolve_device
from client.site import Site
from common.certificates import identity
from common.document import federation as federations
from common.model.weights import Weights
from common.privacy import noise
from common.wire import codec, records
from common.wire import session_pb2 as pb
from common.wire.records import ARRAYS, LOSS, LOST, METRICS, WEIGHT
from server.app import execute
from server.folder.folder import RunFolder
from simulations.inline import InlineGrid
from tests.integration.federation import Federation, Process, until
from tests.integration.proxy import Proxy
from tests.server.sessions.test_grid import Peer
from tests.support import PRIVATE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SHIM = str(Path(__file__).parent / "shim")
ROWS = 96
# All rows are trained on, and all of them in each step. A reply is 270 kB, in two frames. The order of the rows, and
# with it the last bits of a sum, follows a client's key: where relu has a kink, 8,000 steps made 2e-5 of these.
EXACT: dict[str, Any] = {
    "model__activation": "tanh",
    "rows": ROWS,
    "schema__validation_fraction": 0,
    "training__batch_size": ROWS,
    "training__learning_rate": 0.01,
    "model__hidden": [256, 256],
    "strategy__round_timeout": 60,
}
SMALL = {**EXACT, "model__hidden": [8], "training__local_steps": 20}


def reference(
    fed: Federation, names: Collection[str], lost: Collection[tuple[int, str]] = (), rounds: int | None = None
) -> Weights:
    """The model of a run without network and faults, in which `lost` replies (round, client) never came."""
    federation = federations.load(fed.document)
    federation = federation.with_rounds(rounds or federation.training.rounds)
    nodes = dict(enumerate(sorted(names), start=1))
    key, cpu = bytes(32), resolve_device("cpu")  # all rows are in one part, whatever the key
    sites = {}
    for node, name in nodes.items():
        rows = data.read(fed.folder / f"{name}.csv", federation.data_schema, key=key)
        books = Books(
            policy=Policy(epsilon=1.0, delta=0.5, without_privacy=True),
            ledger=Ledger.in_memory(),
            federation=federation,
            dataset=data.split(rows, federation.data_schema, key=key, device=cpu),
        )
        source = noise.seeded(0)
        sites[node] = Site(name=name, account=Account(books, noise=source), device=cpu, noise_of=lambda _, s=source: s)

    @contextmanager
    def site_of(context: Context) -> Iterator[Site]:
        yield sites[context.node_id]

    trains = client_app(site_of)

    def app(message: Message, context: Context) -> Message:
        if (int(message.metadata.group_id), nodes[context.node_id]) in lost:
            return Message(Error(code=LOST, reason="lost"), reply_to=message)
        return trains(message, context)

    folder = RunFolder.create(federation, path=fed.folder / f"reference-{time.monotonic_ns()}")
    execute(federation, InlineGrid(app, nodes, run="run"), folder, name="run", wait_s=0.0)  # type: ignore[arg-type]
    for site in sites.values():
        site.account.close()
    return load_file(folder.path / "model.safetensors")


def assert_model(fed: Federation, expected: Weights) -> None:
    found = load_file(fed.run / "model.safetensors")
    assert list(found) == list(expected)
    for name in expected:
        assert_allclose(found[name], expected[name], atol=1e-5, rtol=0, err_msg=name)


def assert_completed(fed: Federation, rounds: int) -> None:
    """The run has ended with all its rounds, each told once."""
    assert fed.complete == list(range(1, rounds + 1))
    assert (fed.result()["status"], fed.result()["rounds"]) == ("completed", rounds)


def assert_charged(fed: Federation, names: Collection[str]) -> None:
    """Every ledger is whole and in order, and has an entry for each reply that counted."""
    charges = {name: fed.charges(name) for name in names}
    for event in fed.events():
        if event["event"] == "round" and "failed" not in event:
            charged = sum(event["round"] in charges[name] for name in names)
            assert charged >= event["clients"], f"round {event['round']} has replies that nobody was charged for"
    for name in names:
        times = [entry.time for entry in fed.entries(name)]
        assert times == sorted(times)


def frozen_in_training(fed: Federation, name: str, client: Process) -> int:
    """Stops a client after a charge and before its reply, and returns which round that is of."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = fed.charged(name)
        until(lambda before=before: fed.charged(name) > before, f"{name} was charged nothing", client)
        client.send_signal(signal.SIGSTOP)
        until(lambda: "State:\tT" in Path(f"/proc/{client.pid}/status").read_text(), f"{name} did not stop")
        ledger = Ledger.reading(fed.ledger(name))
        last = ledger.entries()[-1]
        ledger.close()
        if "/train/" in last.task and not fed.kept(name):
            return int(last.task.rpartition("/")[2])
        client.send_signal(signal.SIGCONT)  # it was quicker; the next round
    raise AssertionError(f"{name} was never met in training")


def hold_until_other_has_answered(fed: Federation, proxy: Proxy, held: str, other: str, server: Process) -> int:
    """Holds back one client in a round that the other has answered. Returns the round, which cannot end."""
    proxy.hold()
    until(
        lambda: (fed.state_of(held), fed.state_of(other), len(fed.kept(other))) == ("working", "idle", 1),
        f"{held} alone did not hold up the round",
        server,
    )
    return fed.last + 1


def test_a_client_killed_while_idle_training_or_sending_comes_back_and_no_reply_is_lost(federation):
    fed = federation(**EXACT, training__rounds=40, training__local_steps=20)
    server = fed.serve()
    with Proxy(fed.address) as link:
        ada, ben = fed.join("ada"), fed.join("ben", server=link.address)
        fed.round_after(1, server)

        ada.send_signal(signal.SIGSTOP)  # idle: ben has answered, and the round waits for ada
        until(lambda: fed.state_of("ben") == "idle" and fed.kept("ben"), "ben has not answered", server)
        ben.destroy()
        ben = fed.join("ben", server=link.address)
        ben.until("ready")
        ada.send_signal(signal.SIGCONT)
        fed.round_after(fed.last, server)

        again = frozen_in_training(fed, "ben", ben)
        ben.destroy()
        ben = fed.join("ben", server=link.address)
        fed.round_after(again - 1, server)

        link.cut_after(100_000)
        assert link.was_cut.wait(60)
        ben.destroy()
        assert fed.kept("ben")
        ben = fed.join("ben", server=link.address)
        for process in (server, ada, ben):
            process.output()
    assert_completed(fed, 40)
    assert [e["clients"] for e in fed.events() if e["event"] == "round"] == [2] * 40
    assert_model(fed, reference(fed, ["ada", "ben"]))
    with pytest.raises(AssertionError):  # a single reply that is lost would be seen
        assert_model(fed, reference(fed, ["ada", "ben"], lost=[(20, "ben")]))
    assert_charged(fed, ["ada", "ben"])
    # Only the task in hand is done, and charged, again.
    assert fed.charges("ada") == Counter(range(1, 41))
    assert fed.charges("ben") == Counter([*range(1, 41), again])
    assert not fed.kept("ada") and not fed.kept("ben")


def test_a_server_killed_between_rounds_collecting_or_saving_goes_on_where_it_was(federation):
    fed = federation(**SMALL, training__rounds=80)
    server = fed.serve()
    with Proxy(fed.address) as link:
        ada, ben = fed.join("ada"), fed.join("ben", server=link.address)
        fed.round_after(2, server)
        server.destroy()

        server = fed.resume()
        fed.round_after(fed.last, server)
        held = hold_until_other_has_answered(fed, link, "ben", "ada", server)
        server.destroy()
        link.release()

        for when in ("torn", "before", "after"):
            server = dies_while_saving(fed, when)
        assert fed.last > held

        server = fed.resume()
        fed.round_after(fed.last, server)
        server.destroy()
        ben.destroy()
        server, ben = fed.resume(), fed.join("ben", server=link.address)
        for process in (server, ada, ben):
            process.output()
    assert_completed(fed, 80)
    assert_model(fed, reference(fed, ["ada", "ben"]))
    assert_charged(fed, ["ada", "ben"])
    assert fed.charges("ada") == Counter(range(1, 81))  # all that it had finished was kept


def dies_while_saving(fed: Federation, when: str) -> Process:
    """A server that goes on with the run for some rounds, and dies within a checkpoint."""
    number = max(int(path.name[:9]) for path in (fed.run / "checkpoint").glob("[0-9]*"))
    server = fed.resume(PYTHONPATH=SHIM, FAULT_AT_CHECKPOINT=f"{when}:{number + 5}")
    server.output(-signal.SIGKILL)
    return server


def test_under_privacy_nothing_goes_uncharged_and_what_was_kept_is_charged_once(federation):
    fed = federation(**PRIVATE, training__rounds=30, training__local_steps=10)
    server = fed.serve()
    with Proxy(fed.address) as link:
        ada, ben = fed.join("ada"), fed.join("ben", server=link.address)
        again = frozen_in_training(fed, "ben", ben)
        ben.destroy()
        ben = fed.join("ben", server=link.address)
        fed.round_after(again - 1, server)

        hold_until_other_has_answered(fed, link, "ben", "ada", server)
        server.destroy()
        link.release()
        dies_while_saving(fed, "torn")
        dies_while_saving(fed, "before")
        dies_while_saving(fed, "after")
        server = fed.resume()
        for process in (server, ada, ben):
            process.output()
    assert_charged(fed, ["ada", "ben"])
    assert fed.charges("ada") == Counter(range(1, 31))
    assert {e.attempt for e in fed.entries("ada")} == {1}
    assert fed.charges("ben") == Counter([*range(1, 31), again])  # what it did not finish took a spare attempt
    assert {e.task for e in fed.entries("ben") if e.attempt > 1} == {f"{run_name(fed)}/train/{again}"}
    assert fed.complete == list(range(1, 31))
    assert (fed.result()["status"], fed.result()["rounds"]) == ("completed", 30)
    assert fed.result()["privacy"]["row"]["epsilon"] <= 4.0
    told = fed.start("budget", "ben.yaml", "--verify", "--json").output()
    assert json.loads(told)["verified"] is True
    assert json.loads(told)["runs"][0]["epsilon"] <= 4.0


def run_name(fed: Federation) -> str:
    return str(next(e["run"] for e in fed.events() if e["event"] == "start"))


def test_a_slow_or_broken_link_loses_nothing_before_the_deadline_and_one_reply_after_it(federation):
    fed = federation(**{**SMALL, "strategy__round_timeout": 4}, training__rounds=100)
    server = fed.serve()
    ada = fed.join("ada")
    ada.until("ready")
    with Proxy(fed.address) as bens, Proxy(fed.address) as link:
        for proxy in (bens, link):
            proxy.hold()
        ben, cyd = fed.join("ben", server=bens.address), fed.join("cyd", server=link.address)
        until(lambda: bens.accepted and link.accepted, "ben and cyd did not come", ben, cyd)
        link.release()  # cyd is there from the first round on
        cyd.until("ready")
        bens.release()
        all_three = fed.event(lambda e: e.get("clients") == 3 and e["event"] == "round", server)["round"]

        link.delay_s = 0.05
        fed.round_after(fed.last + 2, server)
        link.delay_s = 0.0
        link.hold()
        time.sleep(1.0)  # the fault itself: packets are lost for a second
        link.release()
        fed.round_after(fed.last, server)
        link.cut_after(200)
        assert link.was_cut.wait(30)
        fed.round_after(fed.last + 1, server)
        assert not late(fed)

        link.hold()  # for longer than a round may take
        fed.event(lambda e: len(late(fed)) == 1, server)
        link.release()
        fed.event(lambda e: e["event"] == "round" and e["round"] > late(fed)[0] and e["clients"] == 3, server)
        bens.delay_s = 0.05  # or the rounds without cyd would all be over before it is back
        link.closed = True
        link.cut()
        alone = fed.event(lambda e: e["event"] == "round" and e["round"] > late(fed)[-1] and e["clients"] == 2, server)
        link.closed = False
        fed.event(lambda e: e["event"] == "round" and e["round"] > alone["round"] and e["clients"] == 3, server)
        bens.delay_s = 0.0
        for process in (server, ada, ben, cyd):
            process.output()
    assert_completed(fed, 100)
    rounds = [e for e in fed.events() if e["event"] == "round"]
    lost = {(e["round"], "ben" if e["round"] < all_three else "cyd") for e in rounds if e["clients"] == 2}
    assert {number for number, name in lost if name == "cyd"} >= set(late(fed))
    assert_model(fed, reference(fed, ["ada", "ben", "cyd"], lost))
    assert_charged(fed, ["ada", "ben", "cyd"])
    for name in ("ada", "ben", "cyd"):
        assert max(fed.charges(name).values()) == 1


def late(fed: Federation) -> list[int]:
    """The rounds in which someone's reply came too late."""
    rounds = (e for e in fed.events() if e["event"] == "round")
    return [e["round"] for e in rounds if any(r["kind"] == "late" for r in e["rejected"])]


def test_a_round_that_failed_is_not_asked_again_when_the_server_is_restarted(federation):
    fed = federation(**{**SMALL, "strategy__round_timeout": 3}, training__rounds=12)
    server = fed.serve()
    with Proxy(fed.address) as link:
        ada, ben = fed.join("ada"), fed.join("ben", server=link.address)
        fed.round_after(1, server)
        link.hold()
        failed = fed.event(lambda e: "failed" in e, server)["round"]
        until(lambda: fed.state_of("ada") == "idle", "ada has not answered", server)
        server.destroy()
        link.release()
        server = fed.resume()
        for process in (server, ada, ben):
            process.output()
    assert fed.complete == [n for n in range(1, 13) if n != failed]
    # The reply that ada has kept from the round after it is of the model that this round sends again.
    assert_model(fed, reference(fed, ["ada", "ben"], lost=[(failed, "ben")]))
    assert fed.charges("ada") == Counter(range(1, 13))


def moved(content: bytes, by: float) -> bytes:
    """A reply of the right form, with a model that would be noticed."""
    arrays = codec.decode(content)[ARRAYS]
    state = {name: value + np.float32(by) for name, value in records.to_weights(arrays).items()}
    metrics = MetricRecord({WEIGHT: 1e6, LOSS: 0.5})
    return codec.encode(RecordDict({ARRAYS: records.from_weights(state), METRICS: metrics}))


def _nan(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    peer.answer(task.id, moved(content, float("nan")))


def _twice(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    peer.answer(task.id, moved(content, float("inf")))
    peer.answer(task.id, moved(content, 5.0))  # its first answer is its answer


def _garbage(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    peer.answer(task.id, os.urandom(500))


def _huge(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    peer.say(reply=pb.Reply(id=task.id, size=1 << 40, data=content))


def _short(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    whole = moved(content, 5.0)
    peer.say(reply=pb.Reply(id=task.id, size=len(whole), data=whole[: len(whole) // 2]))


def _another_round(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    peer.answer(task.id.rpartition("/")[0] + "/999", moved(content, 5.0))


def _late(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    if before:
        peer.answer(before[-1], moved(content, 5.0))


def _never(peer: Peer, task: pb.Task, content: bytes, before: list[str]) -> None:
    pass


LIES: dict[str, Callable[[Peer, pb.Task, bytes, list[str]], None]] = {
    "nan": _nan,
    "twice": _twice,
    "garbage": _garbage,
    "huge": _huge,
    "short": _short,
    "another": _another_round,
    "late": _late,
    "never": _never,
}


def test_clients_that_lie_or_stay_silent_do_not_touch_the_model(federation):
    fed = federation(**{**SMALL, "strategy__round_timeout": 3, "names": ("ada", "ben", *LIES)}, training__rounds=12)
    server = fed.serve()
    lied: Counter[str] = Counter()
    welcome = threading.Event()

    def lie(name: str) -> None:
        material = identity.load(fed.certs / "ca.pem", fed.certs / f"{name}.pem", fed.certs / f"{name}.key")
        peer, before = Peer(int(fed.address.rpartition(":")[2]), material), []
        try:
            peer.hello()
            federation = federations.from_canonical(peer.hear("welcome").federation)
            assert welcome.wait(90)
            peer.say(ready=pb.Ready(fingerprint=federation.fingerprint))
            while True:
                frame = next(peer.call)
                if frame.WhichOneof("frame") == "task":
                    LIES[name](peer, frame.task, frame.task.data, before)
                    before.append(frame.task.id)
                    lied[name] += 1
        except (StopIteration, grpc.RpcError):
            pass  # it was sent away, or the run is over
        finally:
            peer.close()

    liars = [threading.Thread(target=lie, args=(name,), daemon=True) for name in LIES]
    for liar in liars:
        liar.start()
    ada, ben = fed.join("ada"), fed.join("ben")
    for honest in (ada, ben):
        honest.until("ready")
    welcome.set()
    text = server.output()
    for process in (ada, ben):
        process.output()
    for liar in liars:
        liar.join(30)
        assert not liar.is_alive()
    assert_completed(fed, 12)
    assert_model(fed, reference(fed, ["ada", "ben"]))
    assert {name for name in LIES if lied[name]} == set(LIES)
    assert lied["never"] < 7  # who never answers is asked ever less often
    seen = {(r["client"], r["kind"]) for e in fed.events() if e["event"] == "round" for r in e["rejected"]}
    assert seen >= {("nan", "rejected"), ("twice", "rejected"), ("garbage", "rejected")}
    assert seen >= {(name, "late") for name in ("huge", "short", "another", "late", "never")}
    assert "a payload of 1099511627776 bytes is not accepted" in text
    assert fed.result()["clients"] == ["ada", "ben"]


def limit_files(process: Process, size: int | None) -> None:
    """Lets a process write files of at most `size` bytes, as if its disk were full; None lets it go on."""
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def test_a_full_disk_is_said_clearly_and_what_is_there_stays_whole(federation):
    fed = federation(**{**EXACT, "strategy__min_clients": 1}, training__rounds=5000, training__local_steps=2)
    server = fed.serve()
    ada = fed.join("ada")
    ada.until("ready")
    ben = fed.join("ben")

    def both(after: int) -> int:
        fed.event(lambda e: e["event"] == "round" and e["clients"] == 2 and e["round"] > after, server)
        return fed.last

    # At a client: no room for the reply, and then not even for the charge.
    for size, problem in ((100_000, "a reply cannot be kept, so it is not sent"), (0, "so nothing is released")):
        both(fed.last)
        limit_files(ben, size)
        ben.until(rf"failed: .*{problem}")
        limit_files(ben, None)
    both(fed.last)

    # At the server: it ends in one line, and is resumed once there is room.
    limit_files(server, 100_000)
    text = server.output(2)
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert "cannot be written: File too large; the checkpoint before it is whole" in line
    assert "Traceback" not in text + ben.text + ada.text
    assert f"--resume {fed.run}" in text
    with safe_open(fed.run / "model.safetensors", "np") as model:
        assert json.loads(model.metadata()["cloister"])["round"] == fed.last
    ada.until("will come back")
    server = fed.resume()
    both(fed.last)
    server.send_signal(signal.SIGINT)
    for process, code in ((server, 130), (ada, 0), (ben, 0)):
        process.output(code)
    rounds = [e for e in fed.events() if e["event"] == "round"]
    lost = {(e["round"], "ben") for e in rounds if e["clients"] == 1}
    assert fed.complete == list(range(1, fed.result()["rounds"] + 1))
    assert_model(fed, reference(fed, ["ada", "ben"], lost, fed.result()["rounds"]))
    assert_charged(fed, ["ada", "ben"])
    assert [path for path in fed.folder.rglob("*.new") if path.is_file()] == []


def test_a_clock_that_jumps_and_an_upgrade_of_the_server_disturb_no_round(federation):
    fed = federation(**SMALL, training__rounds=200)
    clocks = {name: fed.folder / f"{name}.clock" for name in ("server", "ben")}
    server = fed.serve(PYTHONPATH=SHIM, FAULT_CLOCK=str(clocks["server"]))
    ada, ben = fed.join("ada"), fed.join("ben", PYTHONPATH=SHIM, FAULT_CLOCK=str(clocks["ben"]))
    for clock in clocks.values():
        for jump in (86400, -86400, 0):
            fed.round_after(fed.last, server)
            clock.write_text(f"{jump}")
            fed.round_after(fed.last + 2, server)
    days = {round(e["time"] / 86400) for e in fed.events()}
    assert len(days) >= 3  # the clock did jump

    assert seconds_to_end(server, 143) < 10  # an upgrade: the old one is told to end, and the new one goes on
    assert fed.result()["status"] == "stopped"
    for client in (ada, ben):
        client.until("the server has ended and will come back: it was terminated")
    server = fed.resume()
    fed.round_after(fed.last, server)

    assert seconds_to_end(ben, 130) < 10
    assert "left the federation" in ben.text
    ben = fed.join("ben")
    fed.round_after(fed.last, server)
    for process in (server, ada, ben):
        process.output()
    lost = {(e["round"], "ben") for e in fed.events() if "failed" in e}  # what ben had in hand when it left
    assert len(lost) <= 1
    assert fed.complete == [n for n in range(1, 201) if (n, "ben") not in lost]
    assert_model(fed, reference(fed, ["ada", "ben"], lost))
    assert_charged(fed, ["ada", "ben"])


def seconds_to_end(process: Process, code: int) -> float:
    """How long it takes to end after SIGTERM."""
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.output(code)
    return time.monotonic() - started
