"""A client process: stays connected, does what it is asked within its policy, and comes back when a link breaks.

The stream lives on an asyncio loop; training runs in a thread beside it, one task at a time, so that the link
stays alive meanwhile. A task outlives its stream: a reply that was finished while the link was down is sent when
the server asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TypeAlias, TypeVar

import grpc
from flwr.app import Context, Message, RecordDict

from client import kept
from client.account import approval
from client.app import client_app
from client.outbox import Outbox
from client.settings import ClientFile
from client.site import Site, open_site
from common.certificates import identity
from common.certificates.identity import TLSMaterial
from common.document import federation as federations
from common.errors import (
    BudgetExhausted,
    CertificateError,
    CloisterError,
    ConnectionFailed,
    ModelError,
    ProtocolError,
    Refusal,
)
from common.inference import saved
from common.model.memory import room_for
from common.text import is_name, shown
from common.wire import codec, protocol
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from common.wire.channel import CLIENT_OPTIONS
from common.wire.identity import identify_process, node_id
from common.wire.protocol import ClientSide, ModelGiven, TaskGiven
from common.wire.records import BUDGET_EXHAUSTED, CLIENT_FAILED, FAILED, REFUSED

TASKS = ("train", "evaluate")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 15.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a client is in its run: at work on a task, or done with it, and what the run has cost a row so far."""

    round: str  # as the server calls it
    rounds: int
    task: str  # train | evaluate
    done: bool = False
    epsilon: float | None = None  # None without privacy
    limit: float | None = None

    def __str__(self) -> str:
        cost = f", epsilon {self.epsilon:.2f} of {self.limit:g} spent" if self.epsilon is not None else ""
        return f"round {self.round}: {self.task} {'done' if self.done else 'begun'}{cost}"


Say = Callable[[str], None]
Ask = Callable[[str], Awaitable[bool]]
Call: TypeAlias = grpc.aio.StreamStreamCall
Result = TypeVar("Result")


class Node:
    """One participant's process. `run` returns when the federation has finished or the owner's side says no."""

    def __init__(
        self,
        settings: ClientFile,
        *,
        tls: Callable[[], TLSMaterial] | None,
        wait_s: float,
        say: Say,
        ask: Ask | None = None,
        step: Callable[[Step], None] | None = None,
    ) -> None:
        """`tls` is asked before each connection, so that a renewed certificate needs no restart; None is plain text on
        loopback. `wait_s` is how long the server may be away before the node gives up. `say` tells the owner; `ask`
        puts a question that is answered by yes or no, None where nobody can be asked. `step` shows how it goes, in
        place of a line for each task that is done."""
        self._settings, self._tls, self._wait_s, self._ask = settings, tls, wait_s, ask
        self._say: Say = lambda text: say(shown(text, 4000))  # it may have words of the server, or of the table
        self._step = step or (lambda taken: self._say(str(taken)) if taken.done else None)
        self._site: Site | None = None
        self._outbox: Outbox | None = None
        self._fingerprint = ""
        self._run = ""
        self._name = ""
        self._welcome = False  # has the current stream got as far as a welcome?
        self._side = ClientSide()  # of the current stream
        self._call: Call | None = None
        self._left = False  # have we said goodbye?
        self._sending = asyncio.Lock()
        self._working: set[str] = set()  # the tasks that are being done: asked for again, they are not begun twice
        self._handlers: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, "task")

    async def run(self) -> str:
        """Takes part until the server says that the run is over, or we left, and returns what was said.

        Raises:
            Refusal, DataError, LedgerError: the owner's side cannot or will not take part; the server is told.
            ConnectionFailed: the server was away for longer than `wait_s`.
            CertificateError: the two sides do not accept each other's certificates.
        """
        away_since, pause = time.monotonic(), FIRST_PAUSE_S
        try:
            while not self._left:
                self._welcome = False
                try:
                    async with self._channel() as channel:
                        self._call = service.SessionStub(channel).Connect()
                        end = await self._session(self._call)
                        if end is not None:
                            await self._in_thread(self._account_for_the_end)
                            return end
                    reason = "it ended the stream"
                except grpc.aio.AioRpcError as error:
                    reason = _reason(error)
                finally:
                    self._call = None
                if self._left:
                    break
                if self._welcome:
                    away_since, pause = time.monotonic(), FIRST_PAUSE_S
                if pause == FIRST_PAUSE_S:
                    self._say(f"no server at {self._settings.server} ({reason}); waiting up to {self._wait_s:g} s")
                if time.monotonic() - away_since > self._wait_s:
                    raise ConnectionFailed(
                        f"{self._settings.server}: no server within {self._wait_s:g} s ({reason}); is it running, and "
                        "is the address right?"
                    )
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            return "left"
        finally:
            for handler in self._handlers:
                handler.cancel()
            await asyncio.to_thread(self._worker.shutdown)  # a task that is being done still writes to the ledger
            if self._site is not None:
                self._site.close()

    async def leave(self, reason: str) -> None:
        """Says goodbye, if there is anyone to say it to."""
        self._left = True
        call = self._call  # the stream may end, and be forgotten, between any two of these lines
        if call is not None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                await asyncio.wait_for(self._send(pb.ClientFrame(goodbye=pb.Goodbye(reason=reason))), 2.0)
                await asyncio.wait_for(call.done_writing(), 2.0)
                await asyncio.wait_for(call.code(), 2.0)  # so that it has been heard

    def _channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self._settings.server, options=CLIENT_OPTIONS)
        material = self._tls()
        credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.certificate)
        return grpc.aio.secure_channel(self._settings.server, credentials, options=CLIENT_OPTIONS)

    async def _session(self, call: Call) -> str | None:
        """One stream, from hello to its end. Returns the server's last word if the run is over."""
        await self._send(protocol.hello(name=self._settings.name or "", version=version("cloister")))
        self._side = ClientSide()
        async for frame in _frames(call):
            try:
                end = await self._heard(frame)
            except ProtocolError as error:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._refuse(FAILED, f"protocol error: {error}")
                raise
            if end is not None:
                return end or None
        return None

    async def _heard(self, frame: pb.ServerFrame) -> str | None:
        """Does what a frame asks. Returns how the stream ends: None while it goes on, the server's last word if the run
        is over, and "" if the server will come back."""
        said = self._side.heard(frame)
        if frame.WhichOneof("frame") == "task":
            _check_task(frame.task)  # before the rest of its content is waited for
        match said:
            case pb.Welcome() as welcome:
                await self._welcomed(welcome)
            case TaskGiven() as given:
                self._begin(given.task, given.content)
            case ModelGiven() as given:
                await self._in_thread(self._keep, given.content)
            case pb.Ack() as ack:
                assert self._outbox is not None
                self._outbox.drop(ack.id)
            case pb.Rejected() as rejected:
                raise ProtocolError(f"the server turned us away: {shown(rejected.reason)}")
            case pb.Goodbye() as goodbye:
                return self._ended(goodbye)
        return None

    def _ended(self, goodbye: pb.Goodbye) -> str:
        if goodbye.finished:
            return shown(goodbye.reason) or "finished"
        if goodbye.comes_back:
            self._say(f"the server has ended and will come back: {shown(goodbye.reason)}")
            return ""
        raise ConnectionFailed(f"the server ended the session: {shown(goodbye.reason)}")

    async def _welcomed(self, welcome: pb.Welcome) -> None:
        """Checks the federation, opens the site and plans the budget, once; then says ready."""
        self._welcome = True
        for what, name in (("run", welcome.run), ("client", welcome.name)):
            if not is_name(name):
                raise ProtocolError(f"a welcome with a {what}'s name that is none: {shown(name, 40)!r}")
        try:
            if self._site is None:
                await self._ask_owner(welcome)
                await self._in_thread(self._open, welcome)
            elif federations.from_canonical(welcome.federation).fingerprint != self._fingerprint:
                raise Refusal("the federation is not the one that was agreed to before the link broke")
            elif welcome.run != self._run:
                await self._in_thread(self._site.account.budget, welcome.run)
                self._begin_run(welcome.run)
        except BudgetExhausted as error:
            await self._refuse(BUDGET_EXHAUSTED, error.public)
            raise
        except Refusal as error:
            await self._refuse(REFUSED, error.public)
            raise
        except CloisterError:
            # Data errors quote cells, and the others paths: they are the owner's to see.
            await self._refuse(FAILED, "the client could not open its data; its own log says more")
            raise
        self._say(f"connected to {self._settings.server} as {self._name}, ready")
        await self._send(pb.ClientFrame(ready=pb.Ready(fingerprint=self._fingerprint)))
        self._side.agreed()
        # Before the first task, which waits for the same thread.
        asyncio.get_running_loop().run_in_executor(self._worker, self._warm_up)

    def _warm_up(self) -> None:
        """What private training needs and takes a second: Opacus, and its word on the plan."""
        assert self._site is not None
        budget = self._site.account.opened_budget(self._run)
        if budget is None:
            return
        try:
            importlib.import_module("client.training.dpsgd")
            self._say(budget.confirm())
        except Refusal as refusal:
            self._say(str(refusal))  # the first task is answered with it

    async def _in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    async def _ask_owner(self, welcome: pb.Welcome) -> None:
        """With `policy.approved: ask`, shows a federation that the policy allows, and remembers a yes."""
        policy, record = self._settings.policy, self._settings.approvals
        federation = federations.from_canonical(welcome.federation)
        policy.check(federation)  # the owner is not asked about what the policy rules out
        if policy.approved == "ask" and self._ask is not None and not approval.is_remembered(federation, record):
            if not await self._ask(approval.question(federation)):
                raise Refusal("the owner said no")
            approval.remember(federation, record)

    def _open(self, welcome: pb.Welcome) -> None:
        federation = federations.from_canonical(welcome.federation)
        self._settings.policy.check(federation)
        self._say(f"federation {federation.name}, fingerprint {federation.fingerprint}")
        site = open_site(self._settings, federation, name=welcome.name)
        try:
            for line in site.describe():
                self._say(line)
            budget = site.account.budget(welcome.run)
            if budget is not None:
                self._say(budget.describe())
            self._fingerprint = federation.fingerprint
            self._begin_run(welcome.run)
        except BaseException:
            site.account.close()
            raise
        site.run = welcome.run
        self._site, self._name = site, welcome.name
        self._app = client_app(lambda context: nullcontext(site))

    def _begin_run(self, run: str) -> None:
        """Another federation or run that asks for the same task does not get this one's reply."""
        self._outbox = Outbox(self._settings.outbox, run=f"{self._fingerprint}/{run}")
        self._run = run
        if self._site is not None:
            self._site.run = run

    async def _refuse(self, code: int, reason: str) -> None:
        await self._send(pb.ClientFrame(failure=pb.Failure(code=code, reason=reason)))
        await self.leave(reason)

    def _begin(self, task: pb.Task, content: bytes) -> None:
        """Starts a task, unless it is being done already."""
        if task.id in self._working:
            return
        self._working.add(task.id)
        handler = asyncio.create_task(self._do(task, content))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    async def _do(self, task: pb.Task, content: bytes) -> None:
        assert self._outbox is not None
        async with self._one_at_a_time:
            answer: bytes | pb.Failure | None
            done = False
            try:
                answer = self._outbox.find(task.id, content)
                if answer is None:
                    await self._rest(task)
                    self._step(self._at(task))
                    answer = await self._in_thread(self._work, task, content)
                    done = isinstance(answer, bytes)
            except CloisterError as error:
                self._say(f"round {task.group}: {task.type} failed: {error}")
                answer = pb.Failure(id=task.id, code=FAILED, reason=CLIENT_FAILED)
            finally:
                self._working.discard(task.id)  # before we answer: who asks once more from now on is answered once more
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._reply(task.id, answer)
        if done:
            await self._in_thread(self._report, task)  # once it has been sent: the server waits for it

    async def _rest(self, task: pb.Task) -> None:
        """Waits until the policy allows the next round, if the task's time does: otherwise it will be refused."""
        assert self._site is not None
        pause = self._site.account.books.pause() if task.type == "train" else 0.0
        if 0 < pause < task.ttl:
            self._say(f"round {task.group}: waiting {pause:.0f} s, by policy.min_seconds_between_rounds")
            await asyncio.sleep(pause)

    def _work(self, task: pb.Task, content: bytes) -> bytes | pb.Failure:
        """Runs the ClientApp on a task. A finished reply is stored before it is sent."""
        assert self._site is not None and self._outbox is not None
        with room_for(self._site.federation):
            reply = self._app(*self._message(task, codec.decode(content)))
        if reply.has_error():
            self._say(f"round {task.group}: {task.type}: {reply.error.reason}")
            return pb.Failure(id=task.id, code=reply.error.code, reason=reply.error.reason or "")
        with room_for(self._site.federation):
            payload = codec.encode(reply.content)
            self._outbox.keep(task.id, content, payload)
        return payload

    def _report(self, task: pb.Task) -> None:
        assert self._site is not None
        budget = self._site.account.budget(self._run)
        taken = replace(self._at(task), done=True)
        self._step(replace(taken, epsilon=budget.epsilon, limit=budget.limit) if budget else taken)

    def _at(self, task: pb.Task) -> Step:
        assert self._site is not None
        return Step(round=task.group, rounds=self._site.federation.training.rounds, task=task.type)

    def _keep(self, content: bytes) -> None:
        """Keeps the model of a run that is over, with what we stated ourselves. What is none ends nothing."""
        site, sender = self._site, self._settings.server
        assert site is not None
        try:
            model = saved.from_bytes(content, sender)
            if (model.run, model.federation.fingerprint) != (self._run, self._fingerprint):
                raise ModelError(f"{sender}: sent the model of another run than this one")
            own = (site.privacy(self._run)["row"] or {}).get("per_client", {})
            path = kept.keep(self._settings.models, kept.with_own(model, own))
        except ModelError as error:
            self._say(f"warning: {error}; the model that was kept before stays")
            return
        if site.kept is not None:
            site.kept.forget()
        self._say(f"the model after round {model.round} is kept: {path}")

    def _account_for_the_end(self) -> None:
        """Tells the owner what the run has cost, by our accountant and by Opacus', and what energy it took."""
        if self._site is None:
            return
        if (budget := self._site.account.opened_budget(self._run)) is not None:
            self._say(f"run {self._run} is over: {budget.in_the_end()}")
        if self._site.energy is not None and (took := self._site.energy.describe(self._run)):
            self._say(f"run {self._run} took {took}, about; {self._settings.energy_book} has it")

    def _message(self, task: pb.Task, content: RecordDict) -> tuple[Message, Context]:
        node = node_id(self._name)
        run = identify_process(self._run)
        message = Message(content, node, task.type, ttl=task.ttl, group_id=task.group)
        return message, Context(run_id=run, node_id=node, node_config={}, state=RecordDict(), run_config={})

    async def _reply(self, task_id: str, answer: bytes | pb.Failure) -> None:
        if (call := self._call) is None:
            return  # the server asks again when we are back
        if isinstance(answer, pb.Failure):
            await self._send(pb.ClientFrame(failure=answer))
            return
        async with self._sending:
            for frame in protocol.reply_frames(task_id, answer):
                await call.write(frame)

    async def _send(self, frame: pb.ClientFrame) -> None:
        if (call := self._call) is None:
            return
        async with self._sending:
            with contextlib.suppress(asyncio.InvalidStateError):  # it ended; why, the reading side will hear
                await call.write(frame)


def _check_task(task: pb.Task) -> None:
    """Raises `ProtocolError` unless it is a task that we know, in names that can be shown."""
    if not (is_name(task.id) and is_name(task.group)):
        raise ProtocolError(f"a task with a name that is none: {shown(task.id, 40)!r}, {shown(task.group, 40)!r}")
    if task.type not in TASKS:
        raise ProtocolError(f"a task {shown(task.type, 40)!r}; known are {' and '.join(TASKS)}")
    if not 0 < task.ttl < math.inf:
        raise ProtocolError(f"a task of {task.ttl:g} s")


async def _frames(call: Call) -> AsyncIterator[pb.ServerFrame]:
    while (frame := await call.read()) is not grpc.aio.EOF:
        yield frame


def _reason(error: grpc.aio.AioRpcError) -> str:
    """gRPC's account of a broken link, in short. Raises `CertificateError` where waiting would not help."""
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        raise CertificateError(
            "the server does not accept our certificate; it may be revoked, or not a client's: whoever runs the server "
            "finds the reason in its log"
        ) from error
    details = error.details() or error.code().name
    if (fault := identity.fault_in(details)) is not None:
        raise CertificateError(f"the server is not accepted: {fault}") from error
    return shown(str(details).splitlines()[0], 160)
