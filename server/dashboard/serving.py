"""The dashboard's thread: uvicorn on a loop of its own, so that pages never wait for a round, nor a round for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.document.federation import Federation
from common.errors import CertificateError, ConnectionFailed
from common.wire.address import Address
from server.dashboard.access import Access, url
from server.dashboard.app import app
from server.dashboard.feed import Feed
from server.dashboard.view import Clients, View
from server.rounds.events import Event

MOST_CONNECTIONS = 300  # more are told to come back later
MOST_TOLD = 50  # ... and more than so many of these are told nothing
LAST_WORDS_S = 1  # for pages to take the end
PATIENCE_S = 5.0  # for a loop to answer
REFRESH_S = 2.0  # between looks at the certificate

log = logging.getLogger("cloister.server")


class Link(H11Protocol):
    """One connection. Those that ask for nothing are not told to come back, and each takes one of the process's files,
    which the run needs: so there is an end to them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS + MOST_TOLD:
            transport.abort()


class Dashboard:
    """Give it every event of a run, from any thread. The port is taken at once; pages are answered from `start` to
    `stop`."""

    def __init__(
        self,
        federation: Federation,
        run: str,
        access: Access,
        *,
        clients: Callable[[], concurrent.futures.Future[Clients]],
    ) -> None:
        """`clients` asks who is there.

        Raises:
            ConnectionFailed: the port is in use, or the address is not this machine's.
            CertificateError: the server's certificate cannot be used.
        """
        self._access, self._ask = access, clients
        self._view = View(federation, run)
        self._feed = Feed(self._view)
        self._context = access.context()
        self._socket = _bound(access.address)
        self.port = int(self._socket.getsockname()[1])
        self.url = url(access, self.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._server = uvicorn.Server(self._config())

    def _config(self) -> uvicorn.Config:
        context = self._context
        return uvicorn.Config(
            app(self._feed, self._access),
            http=Link,
            ssl_context_factory=(lambda *_: context) if context is not None else None,
            log_config=None,
            log_level=logging.CRITICAL + 1,  # what is ours to know, our log says
            access_log=False,  # an address may hold the token
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )

    def __call__(self, event: Event) -> None:
        self._feed(event)

    def start(self, before: Iterable[Event] = ()) -> None:
        """Answers pages. `before` is what happened in the run under a server before this one."""
        for event in before:
            self._view.take(event)
        self._thread.start()

    def stop(self) -> None:
        """Tells pages what happened last, and gives the port back."""
        if self._thread.ident is None:  # it was never started
            self._loop.close()
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._feed.close)
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(LAST_WORDS_S + PATIENCE_S)
        self._socket.close()

    # On the thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:
            log.exception("the dashboard met an error, and is gone; the run goes on")
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._loop.set_exception_handler(lambda _, told: log.debug("the dashboard's loop: %s", told["message"]))
        async with asyncio.TaskGroup() as beside:
            tasks = [beside.create_task(self._feed.run(self._clients)), beside.create_task(self._renew())]
            await self._server.serve(sockets=[self._socket])
            for task in tasks:
                task.cancel()
            for link in self._server.server_state.connections:  # of pages that took too long
                link.transport.abort()
            await asyncio.sleep(0)  # until they are closed

    async def _clients(self) -> Clients:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.wrap_future(self._ask())

    async def _renew(self) -> None:
        """Serves with the server's certificate as it is now."""
        identity, context = self._access.identity, self._context
        if identity is None or context is None:
            return
        seen = identity.material
        while True:
            await asyncio.sleep(REFRESH_S)
            if identity.material != seen:
                try:
                    self._access.load_certificate(context)
                    seen = identity.material
                except CertificateError as error:
                    log.warning("%s; the dashboard goes on with the one before", error)


def _bound(address: Address) -> socket.socket:
    host = address.host.strip("[]")
    try:
        family = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, address.port), family=family)
    except UnicodeError as error:  # a name that no host can have, such as a..b
        raise ConnectionFailed(f"--dashboard {address}: cannot be served: no such host") from error
    except OSError as error:
        raise ConnectionFailed(f"--dashboard {address}: cannot be served: {error.strerror}") from error
