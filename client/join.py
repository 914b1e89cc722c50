"""`cloister join`: a client process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

from client.node import Node, Say
from client.site import load_client_file, resolve_device
from common.errors import CertificateError, ConfigError
from common.logs import log_to, quiet_flower
from common.wire import tls

INTERRUPTED = 130


def join(document: Path, *, wait_s: float, say: Say) -> int:
    """Takes part until the run is over. Returns the exit code: 0, or 130 after Ctrl-C.

    Raises:
        CloisterError: what `Node.run` raises, and mistakes in the file, its certificates or its device.
    """
    settings = load_client_file(document)
    material = None
    if settings.tls is not None:
        files = settings.tls
        material = tls.load(Path(files.ca), Path(files.certificate), Path(files.key))
    else:
        host = settings.server.rpartition(":")[0]
        if not tls.is_loopback(host):
            raise CertificateError(f"{document}: tls is null, and plain text is for loopback only, not {host}")
        if settings.name is None:
            raise ConfigError([f"{document}: name is missing; without TLS no certificate says who you are"])
    resolve_device(settings.device)
    quiet_flower()
    log_to(logging.StreamHandler())
    node = Node(settings, tls=material, wait_s=wait_s, say=say, ask=_ask if sys.stdin.isatty() else None)
    return asyncio.run(_until_interrupted(node, say))


async def _until_interrupted(node: Node, say: Say) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    work = asyncio.create_task(node.run())
    interrupt = asyncio.create_task(stop.wait())
    await asyncio.wait([work, interrupt], return_when=asyncio.FIRST_COMPLETED)
    interrupt.cancel()
    if work.done():
        say(f"the run is over: {work.result()}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one does not wait for the task in hand
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    await node.leave("interrupted by its owner")
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)  # whatever it met on the way out, we have left
    say("left the federation")
    return INTERRUPTED


async def _ask(question: str) -> bool:
    """Asks on the terminal; anything but yes is no. Waits without a thread, so that Ctrl-C still works."""
    print(question, end="", flush=True)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        if not answer.done():
            answer.set_result(sys.stdin.readline())

    loop.add_reader(sys.stdin, read)
    try:
        return (await answer).strip().lower() in ("y", "yes")
    finally:
        loop.remove_reader(sys.stdin)
