"""GrpcGrid and its sessions over real loopback sockets, against a client that says whatever a test wants."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from common.certificates import authority, identity
from common.certificates.identity import ServerIdentity, TLSMaterial
from common.errors import CertificateError, ConnectionFailed, RunFolderError
from common.wire import codec, protocol, records
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from common.wire.identity import node_id
from common.wire.protocol import ClientSide, ModelGiven, TaskGiven
from common.wire.records import REFUSED
from server.rounds.admission import Rejection
from server.sessions.gate import USUAL, Limits
from server.sessions.grid import GrpcGrid
from tests.support import federation

FEDERATION = federation()


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority.create_authority(folder)
    authority.create_server(folder, ["127.0.0.1"])
    for name in ("ada", "ben"):
        authority.create_client(folder, name)
    return folder


def material(folder: Path, name: str) -> TLSMaterial:
    return identity.load(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")


@contextmanager
def serving(certs: Path, limits: Limits = USUAL, **options: Any) -> Iterator[GrpcGrid]:
    identity = ServerIdentity(certs)
    served = GrpcGrid(FEDERATION, run="run", address="127.0.0.1:0", identity=identity, limits=limits, **options)
    served.start()
    try:
        yield served
    finally:
        served.stop("the test is over")


@pytest.fixture
def grid(certs: Path) -> Iterator[GrpcGrid]:
    with serving(certs) as served:
        yield served


class Peer:
    """A client's end of a stream: says what it is told to, hears what the server says."""

    def __init__(self, port: int, tls_material: TLSMaterial | None) -> None:
        address = f"127.0.0.1:{port}"
        if tls_material is None:
            self._channel = grpc.insecure_channel(address)
        else:
            m = tls_material
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(m.ca, m.key, m.certificate))
        self._outbox: queue.Queue[pb.ClientFrame | None] = queue.Queue()
        self.call = service.SessionStub(self._channel).Connect(iter(self._outbox.get, None))
        self._side = ClientSide()
        self._side.agreed()  # it is up to a test what is said, and when

    def say(self, **frame: Any) -> None:
        self._outbox.put(pb.ClientFrame(**frame))

    def hear(self, kind: str) -> Any:
        """The next frame, which must be of this kind."""
        frame = next(self.call)
        assert frame.WhichOneof("frame") == kind, frame
        return getattr(frame, kind)

    def hello(self, name: str = "", protocol: int = protocol.PROTOCOL) -> None:
        self.say(hello=pb.Hello(protocol=protocol, name=name, version="test"))

    def join(self) -> pb.Welcome:
        self.hello()
        welcome = self.hear("welcome")
        self.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        return welcome

    def take(self) -> tuple[pb.Task, bytes]:
        given = None
        while given is None:
            given = self._side.heard(next(self.call))
        assert isinstance(given, TaskGiven), given
        return given.task, given.content

    def answer(self, task_id: str, content: bytes) -> None:
        for frame in protocol.reply_frames(task_id, content):
            self._outbox.put(frame)

    def close(self) -> None:
        self._outbox.put(None)
        self.call.cancel()
        self._channel.close()


@pytest.fixture
def peer(grid: GrpcGrid, certs: Path) -> Iterator[Callable[[str], Peer]]:
    with ExitStack() as peers:

        def connect(name: str) -> Peer:
            made = Peer(grid.port, material(certs, name))
            peers.callback(made.close)
            return made

        yield connect


def message(client: str, *, size: int = 3, group: str = "1") -> Message:
    content = RecordDict({"arrays": records.from_weights({"w": np.arange(size, dtype=np.float32)})})
    return Message(content, node_id(client), "train", group_id=group)


def content_of(value: float = 1.0, *, size: int = 3) -> bytes:
    arrays = records.from_weights({"w": np.full(size, value, np.float32)})
    return codec.encode(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1.0})}))


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def asking(grid: GrpcGrid, *messages: Message, timeout: float = 10.0) -> Iterator[list[Message]]:
    """send_and_receive in a thread; the replies are there after the block."""
    replies: list[Message] = []
    thread = threading.Thread(target=lambda: replies.extend(grid.send_and_receive(messages, timeout=timeout)))
    thread.start()
    yield replies
    thread.join(timeout + 60)
    assert not thread.is_alive()


def joined(grid: GrpcGrid, connect: Callable[[str], Peer], *names: str) -> list[Peer]:
    peers = [connect(name) for name in names]
    for each in peers:
        each.join()
    until(lambda: len(grid.get_node_ids()) == len(names))
    return peers


def test_a_client_is_welcomed_with_the_federation_and_is_there_once_it_is_ready(grid, peer):
    ada = peer("ada")
    ada.hello()
    welcome = ada.hear("welcome")
    assert (welcome.federation, welcome.run, welcome.name) == (FEDERATION.canonical, "run", "ada")
    assert grid.get_node_ids() == []
    ada.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
    until(lambda: grid.get_node_ids() == [node_id("ada")])
    assert grid.name_of(node_id("ada")) == "ada"
    ada.close()
    until(lambda: grid.get_node_ids() == [])


def test_a_client_is_who_its_certificate_says_whatever_it_claims(grid, peer):
    ada = peer("ada")
    ada.hello(name="ben")
    assert ada.hear("welcome").name == "ada"


def test_a_task_and_its_reply_travel_in_chunks(grid, peer):
    (ada,) = joined(grid, peer, "ada")
    large = message("ada", size=240_000)  # 960 kB
    with asking(grid, large) as replies:
        task, content = ada.take()
        assert (task.type, task.group, task.id) == ("train", "1", "run/train/1")
        assert task.size > 2 * protocol.CHUNK
        ada.answer(task.id, content)
    (reply,) = replies
    assert np.array_equal(reply.content["arrays"]["w"].numpy(), np.arange(240_000, dtype=np.float32))
    assert reply.metadata.src_node_id == node_id("ada")
    assert reply.metadata.group_id == "1"


def test_a_content_that_all_clients_get_is_encoded_once(grid, peer, monkeypatch):
    ada, ben = joined(grid, peer, "ada", "ben")
    encoded = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda content: encoded.append(1) or encode(content))
    shared = message("ada").content
    both = [Message(shared, node_id(name), "train", group_id="1") for name in ("ada", "ben")]
    with asking(grid, *both) as replies:
        contents = [each.take() for each in (ada, ben)]
        for each, (task, content) in zip((ada, ben), contents, strict=True):
            each.answer(task.id, content)
    assert len(replies) == 2
    assert len(encoded) == 1


def test_a_second_answer_is_acknowledged_and_dropped(grid, peer):
    (ada,) = joined(grid, peer, "ada")
    with asking(grid, message("ada")) as replies:
        task, _ = ada.take()
        ada.answer(task.id, content_of(1.0))
        ada.answer(task.id, content_of(2.0))
        ada.hear("ack")
    assert [r.content["arrays"]["w"].numpy()[0] for r in replies] == [1.0]


def test_an_answer_is_acknowledged_when_its_round_is_on_disk_and_not_before(grid, peer):
    ada, ben = joined(grid, peer, "ada", "ben")
    with asking(grid, message("ada"), message("ben")) as replies:
        for each in (ada, ben):
            task, _ = each.take()
            each.answer(task.id, content_of())
    assert len(replies) == 2
    grid.push_messages([message("ada", group="2")])
    assert ada.take()[0].group == "2"  # and no ack before it
    grid.settle()
    assert (ada.hear("ack").id, ben.hear("ack").id) == ("run/train/1", "run/train/1")
    grid.settle()
    grid.push_messages([message("ben", group="2")])
    assert ben.take()[0].group == "2"  # and no second one


def test_no_client_can_answer_for_another(grid, peer):
    ada, ben = joined(grid, peer, "ada", "ben")
    with asking(grid, message("ada")) as replies:
        task, _ = ada.take()
        ben.answer(task.id, content_of(6.0))
        ada.answer(task.id, content_of(1.0))
    assert [r.content["arrays"]["w"].numpy()[0] for r in replies] == [1.0]


def test_a_round_ends_at_its_deadline_and_late_answers_are_dropped(grid, peer):
    ada, ben = joined(grid, peer, "ada", "ben")
    started = time.monotonic()
    with asking(grid, message("ada"), message("ben"), timeout=0.5) as replies:
        task, _ = ada.take()
        late, _ = ben.take()
        ada.answer(task.id, content_of())
    assert time.monotonic() - started > 0.4
    assert [r.metadata.src_node_id for r in replies] == [node_id("ada")]
    ben.answer(late.id, content_of())
    assert ben.hear("ack").id == late.id
    assert grid.pull_messages([late.id]) == []


def test_a_client_that_comes_back_gets_its_task_again(grid, peer):
    (ada,) = joined(grid, peer, "ada")
    with asking(grid, message("ada")) as replies:
        first = ada.take()
        ada.close()
        again = peer("ada")
        again.join()
        assert again.take() == first
        again.answer(first[0].id, content_of(3.0))
    assert [r.content["arrays"]["w"].numpy()[0] for r in replies] == [3.0]


def test_a_newer_session_of_the_same_client_replaces_the_older(grid, peer):
    (old,) = joined(grid, peer, "ada")
    new = peer("ada")
    new.join()
    assert "a newer session" in old.hear("goodbye").reason
    with asking(grid, message("ada")) as replies:
        task, _ = new.take()
        new.answer(task.id, content_of())
    assert len(replies) == 1
    assert grid.get_node_ids() == [node_id("ada")]


def test_the_goodbye_of_a_replaced_session_does_not_take_the_newer_ones_tasks(grid, peer):
    (old,) = joined(grid, peer, "ada")
    new = peer("ada")
    new.join()
    with asking(grid, message("ada")) as replies:
        task, _ = new.take()
        old.say(goodbye=pb.Goodbye(reason="replaced"))
        time.sleep(0.2)
        new.answer(task.id, content_of(4.0))
    assert [r.content["arrays"]["w"].numpy()[0] for r in replies] == [4.0]


def test_a_client_that_says_goodbye_is_not_waited_for(grid, peer):
    (ada,) = joined(grid, peer, "ada")
    started = time.monotonic()
    with asking(grid, message("ada"), timeout=600) as replies:
        ada.take()
        ada.say(goodbye=pb.Goodbye(reason="lunch"))
    assert time.monotonic() - started < 60  # and not until the deadline, however busy the machine
    assert (replies[0].error.code, replies[0].error.reason) == (records.LOST, "the client left: lunch")


def test_a_refusal_of_a_task_becomes_flowers_error(grid, peer):
    (ada,) = joined(grid, peer, "ada")
    with asking(grid, message("ada")) as replies:
        task, _ = ada.take()
        ada.say(failure=pb.Failure(id=task.id, code=records.BUDGET_EXHAUSTED, reason="spent"))
    assert (replies[0].error.code, replies[0].error.reason) == (records.BUDGET_EXHAUSTED, "spent")


def test_a_refusal_of_the_federation_is_kept_with_its_reason(grid, peer):
    ada = peer("ada")
    ada.hello()
    ada.hear("welcome")
    ada.say(failure=pb.Failure(code=records.REFUSED, reason="policy says no"))
    until(lambda: grid.refusals() == [Rejection(node_id("ada"), records.REFUSED, "policy says no")])
    assert grid.get_node_ids() == []
    assert grid.name_of(node_id("ada")) == "ada"  # who has never been ready has a name as well


@pytest.mark.parametrize("content", [b"g", b"garbage", content_of()[:-2], b"\xff" * 100])
def test_an_answer_that_cannot_be_read_is_a_failure_of_that_client(grid, peer, content):
    (ada,) = joined(grid, peer, "ada")
    with asking(grid, message("ada")) as replies:
        task, _ = ada.take()
        ada.answer(task.id, content)
    assert replies[0].error.code == records.FAILED
    assert "cannot be read" in replies[0].error.reason


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([{"ready": pb.Ready(fingerprint="0" * 64)}], "agreed to another federation"),
        ([{"hello": pb.Hello(protocol=1)}], "a frame hello is not expected here"),
        ([{"chunk": pb.Chunk(data=b"x")}], "a frame chunk is not expected here"),
        (
            [{"reply": pb.Reply(id="t", size=1)}, {"chunk": pb.Chunk(data=b"xx")}],
            "announced with 1 bytes has at least 2",
        ),
        ([{"reply": pb.Reply(id="t", size=1 << 40)}], "is not accepted; from 1 to 1049104 are"),
        ([{"reply": pb.Reply(id="t", size=0)}], "a payload of 0 bytes is not accepted"),
        ([{}], "a frame None is not expected here"),
    ],
)
def test_what_a_client_may_not_say_ends_its_session_with_a_reason(grid, peer, frames, reason):
    ada = peer("ada")
    ada.hello()
    ada.hear("welcome")
    for frame in frames:
        ada.say(**frame)
    assert reason in ada.hear("rejected").reason
    with pytest.raises(StopIteration):
        next(ada.call)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ({"hello": pb.Hello(protocol=99)}, "speaks protocol 99; this server speaks 3"),
        ({"ready": pb.Ready()}, "the first frame must be a hello"),
    ],
)
def test_a_stream_that_begins_badly_is_turned_away(grid, peer, frame, reason):
    ada = peer("ada")
    ada.say(**frame)
    assert reason in ada.hear("rejected").reason


def test_a_silent_connection_is_turned_away(certs):
    with serving(certs, Limits(hello_s=0.2)) as grid:
        ada = Peer(grid.port, material(certs, "ada"))
        with pytest.raises(grpc.RpcError, match="no hello in time"):
            next(ada.call)
        ada.close()


def test_a_foreign_or_missing_certificate_does_not_get_as_far_as_hello(grid, certs, tmp_path):
    authority.create_authority(tmp_path)
    authority.create_client(tmp_path, "ada")
    foreign = material(tmp_path, "ada")
    ours = material(certs, "ada")
    for tried in (TLSMaterial(ca=ours.ca, certificate=foreign.certificate, key=foreign.key), None):
        stranger = Peer(grid.port, tried)
        stranger.hello()
        with pytest.raises(grpc.RpcError) as error:
            next(stranger.call)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        stranger.close()


def test_plain_text_is_for_loopback_only():
    grid = GrpcGrid(FEDERATION, run="run", address="0.0.0.0:0", identity=None)
    with pytest.raises(CertificateError, match=r"only loopback is served, not 0\.0\.0\.0"):
        grid.start()
    grid.stop("")


def test_a_port_in_use_is_said_so(grid):
    second = GrpcGrid(FEDERATION, run="run", address=f"127.0.0.1:{grid.port}", identity=None)
    with pytest.raises(ConnectionFailed, match="the port is in use"):
        second.start()
    second.stop("")


def test_stopping_tells_every_client_that_it_is_over(certs, peer, grid):
    (ada,) = joined(grid, peer, "ada")
    stopper = threading.Thread(
        target=lambda: grid._call(grid.sessions.finish(pb.Goodbye(reason="completed", finished=True)))
    )
    stopper.start()
    goodbye = ada.hear("goodbye")
    assert (goodbye.reason, goodbye.finished) == ("completed", True)
    stopper.join(5)


@contextmanager
def finishing(grid: GrpcGrid, model: bytes | None) -> Iterator[None]:
    """Says the last words in a thread, as long as the context lasts."""
    thread = threading.Thread(target=grid.finish, args=("completed", model))
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("size", [1, 3 * protocol.CHUNK + 1])
def test_who_takes_part_gets_the_model_of_a_run_that_is_over_before_the_goodbye(grid, peer, size):
    model = bytes(range(256)) * (size // 256) + b"m" * (size % 256)
    ada, ben = joined(grid, peer, "ada", "ben")
    with finishing(grid, model):
        for client in (ada, ben):
            given = None
            while given is None:
                given = client._side.heard(next(client.call))
            assert given == ModelGiven(model)
            assert client.hear("goodbye").finished


def test_a_client_that_still_answers_hears_the_last_words_all_the_same(grid, certs):
    # As a real client does, in asyncio: there a write to a stream that has ended takes away what was not read yet.
    async def take_part(port: int) -> bool:
        m = material(certs, "ada")
        credentials = grpc.ssl_channel_credentials(m.ca, m.key, m.certificate)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            call = service.SessionStub(channel).Connect()
            await call.write(protocol.hello(name="", version="test"))
            assert (await call.read()).WhichOneof("frame") == "welcome"
            await call.write(pb.ClientFrame(ready=pb.Ready(fingerprint=FEDERATION.fingerprint)))
            assert (await call.read()).WhichOneof("frame") == "model"
            await asyncio.sleep(0.3)  # the model is put on disk; the server has said all by now
            for frame in protocol.reply_frames("run/train/1", b"x" * 3 * protocol.CHUNK):
                await call.write(frame)
            return bool((await call.read()).goodbye.finished)

    with finishing(grid, b"model"):
        assert asyncio.run(asyncio.wait_for(take_part(grid.port), 20))


def test_who_has_not_agreed_to_the_federation_gets_no_model_of_it(grid, peer):
    joining = peer("ada")
    joining.hello()
    joining.hear("welcome")
    with finishing(grid, b"model"):
        assert joining.hear("goodbye").finished
    late = peer("ben")
    assert late.join().run == "run"  # it agrees after the end
    assert late.hear("model").data == b"model"
    assert late.hear("goodbye").finished
    refuses = peer("ada")
    refuses.hello()
    refuses.hear("welcome")
    refuses.say(failure=pb.Failure(code=REFUSED, reason="no"))
    assert refuses.hear("goodbye").finished


def fetched(grid: GrpcGrid, folder: Path, name: str) -> bytes:
    m = material(folder, name)
    credentials = grpc.ssl_channel_credentials(m.ca, m.key, m.certificate)
    with grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials) as channel:
        return b"".join(chunk.data for chunk in service.SessionStub(channel).Fetch(pb.FetchRequest(), timeout=20))


def test_a_model_is_fetched_in_parts_and_only_where_there_is_one(grid, certs):
    def none() -> bytes:
        raise RunFolderError("/a/path/of/the/server: no round is complete")

    for absent in (None, none):
        grid.sessions.model = absent
        with pytest.raises(grpc.RpcError) as refused:
            fetched(grid, certs, "ada")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == "no round is complete yet"
    model = b"0123456789" * protocol.CHUNK
    grid.sessions.model = lambda: model
    assert fetched(grid, certs, "ada") == model


def test_who_does_not_read_the_model_that_it_asked_for_keeps_nobody_waiting_and_gets_no_other(grid, certs):
    grid.sessions.model = lambda: bytes(300 * protocol.CHUNK)
    m = material(certs, "ada")
    credentials = grpc.ssl_channel_credentials(m.ca, m.key, m.certificate)
    with grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials) as channel:
        idle = service.SessionStub(channel).Fetch(pb.FetchRequest(), timeout=60)
        next(idle)
        grid.sessions.model = lambda: b"small"
        assert fetched(grid, certs, "ben") == b"small"
        with pytest.raises(grpc.RpcError) as refused:
            fetched(grid, certs, "ada")
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    until(lambda: not grid.sessions._fetching)  # it hung up
    assert fetched(grid, certs, "ada") == b"small"


def test_config_and_arrays_reach_the_client_as_they_were(grid, peer):
    (ada,) = joined(grid, peer, "ada")
    content = RecordDict({"config": ConfigRecord({"server-round": 3}), "arrays": ArrayRecord()})
    with asking(grid, Message(content, node_id("ada"), "evaluate", group_id="3")):
        task, data = ada.take()
        assert codec.decode(data)["config"] == {"server-round": 3}
        ada.say(goodbye=pb.Goodbye())
    assert task.type == "evaluate"
