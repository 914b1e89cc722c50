"""`cloister join`: a client process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from client.checking import check_table
from client.device import resolve_device
from client.node import Node, Say
from client.site import TLSFiles, load_client_file
from common.certificates import identity
from common.certificates.identity import TLSMaterial
from common.errors import CertificateError, ConfigError
from common.logs import LogFormat, json_handler, log_to, quiet_flower, tell, text_handler
from common.wire.address import parse

log = logging.getLogger("cloister.client")

INTERRUPTED = 130
LONGEST_FAREWELL_S = 4.0  # for the task in hand, so that all is over within 10


def join(document: Path, *, wait_s: float, log_format: LogFormat, console: Console, strict: bool = False) -> int:
    """Takes part until the run is over. Returns the exit code: 0, or 130 after Ctrl-C.

    Args:
        strict: first check the table against the owner's copy of the federation, every cell of it.

    Raises:
        CloisterError: what `Node.run` raises, and mistakes in the file, its certificates or its device.
    """
    settings = load_client_file(document)
    say = _say(log_format, console)
    if strict:
        for line in check_table(settings, document):
            say(line)
    if (files := settings.tls) is None:
        host = parse(settings.server).host
        if not identity.is_loopback(host):
            raise CertificateError(f"{document}: tls is null, and plain text is for loopback only, not {host}")
        if settings.name is None:
            raise ConfigError([f"{document}: name is missing; without TLS no certificate says who you are"])
        material = None
    else:
        material = _reread(files, say)
        if (warning := identity.expiry_warning(material().certificate, Path(files.certificate))) is not None:
            say(f"warning: {warning}")
    resolve_device(settings.device)
    quiet_flower()
    log_to(json_handler() if log_format == LogFormat.JSON else text_handler())
    node = Node(settings, tls=material, wait_s=wait_s, say=say, ask=_ask if sys.stdin.isatty() else None)
    return asyncio.run(_until_interrupted(node, say))


def _reread(files: TLSFiles, say: Say) -> Callable[[], TLSMaterial]:
    """Reads the TLS files anew each time, so that a renewed certificate needs no restart. Files that cannot be used,
    perhaps because they are just being replaced, leave in use what was read before."""
    held: list[TLSMaterial] = []

    def read() -> TLSMaterial:
        try:
            held[:] = [identity.load(Path(files.ca), Path(files.certificate), Path(files.key))]
        except CertificateError as error:
            if not held:
                raise
            say(f"warning: {error}; the certificate of before stays in use")
        return held[0]

    return read


def _say(log_format: LogFormat, console: Console) -> Say:
    """How the owner is told."""
    if log_format == LogFormat.JSON:
        return log.info
    return lambda text: tell(console, text)


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
    _, unfinished = await asyncio.wait([work], timeout=LONGEST_FAREWELL_S)  # whatever it meets on the way out
    say("left the federation")
    if unfinished:
        # A step of training cannot be interrupted. What it may release is charged, and has not left.
        say("the task in hand was given up")
        os._exit(INTERRUPTED)
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
