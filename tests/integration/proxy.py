"""A TCP proxy that breaks links as networks do: it delays, holds back, cuts, and cuts after so many bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Any

RESET = struct.pack("ii", 1, 0)  # SO_LINGER that ends a connection without a word


class Proxy:
    """Passes connections on to `target` (HOST:PORT), which may change for the next one. What is held back is not lost,
    since TCP would send it again; what is on its way when a link is cut, is."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.delay_s = 0.0  # for each piece, either way
        self.closed = False  # are new connections refused?
        self.accepted = 0  # connections so far
        self.was_cut = threading.Event()  # by `cut_after`
        self._left: int | None = None  # bytes upstream until the cut
        self._open = threading.Event()
        self._open.set()
        self._links: set[tuple[socket.socket, socket.socket]] = set()
        self._halves: set[tuple[socket.socket, socket.socket]] = set()  # that have ended one way
        self._turn = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def hold(self) -> None:
        """Passes nothing on, either way: a black hole."""
        self._open.clear()

    def release(self) -> None:
        """Passes on again, first what was held back."""
        self._open.set()

    def cut(self) -> None:
        """Ends all connections at once."""
        with self._turn:
            links, self._links = self._links, set()
        for link in links:
            _end(*link)

    def cut_after(self, size: int) -> None:
        """Ends the connection within what a client sends, after `size` more bytes."""
        self.was_cut.clear()
        self._left = size

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.release()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.closed:
                _end(client)
                continue
            try:
                host, _, port = self.target.rpartition(":")
                server = socket.create_connection((host, int(port)), timeout=5)
                server.settimeout(None)
            except OSError:
                _end(client)
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = (client, server)
            with self._turn:
                self._links.add(link)
            for source, sink, up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass, args=(link, source, sink, up), daemon=True).start()

    def _pass(
        self, link: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket, up: bool
    ) -> None:
        try:
            while data := source.recv(1 << 14):
                self._open.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                if up and self._left is not None:
                    data = data[: self._left]
                    self._left -= len(data)
                sink.sendall(data)
                if up and self._left == 0:
                    self._left = None
                    sink.shutdown(socket.SHUT_WR)  # the part that was sent does arrive
                    _end(source)
                    self.was_cut.set()
                    return
            sink.shutdown(socket.SHUT_WR)  # the other way may go on
        except OSError:
            _end(*link)
        with self._turn:
            if link in self._halves:
                self._halves.discard(link)
                self._links.discard(link)
                for end in link:
                    end.close()
            else:
                self._halves.add(link)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
