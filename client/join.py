"""A client process: one table that takes part in one federation until its run is over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

from client.device import resolve_device
from client.node import Ask, Node, Say, Step
from client.settings import ClientFile
from client.tls import client_tls
from common.certificates import identity

INTERRUPTED = 130
# Ctrl-C, a service manager's word, and on Windows also Ctrl-Break.
INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
LONGEST_FAREWELL_S = 4.0  # for the task in hand, so that all is over within 10


def join(
    settings: ClientFile,
    document: Path,
    *,
    wait_s: float,
    say: Say,
    ask: Ask | None,
    step: Callable[[Step], None] | None = None,
    interrupted: Callable[[], None] = lambda: None,
) -> int:
    """Takes part until the run is over. Returns the exit code: 0, or 130 after Ctrl-C.

    Args:
        document: the file that the settings are from.
        wait_s: seconds that the server may be away before it is given up.
        say: tells the owner a line.
        ask: puts a question to the owner; None if nobody is there to answer.
        step: shows how it goes, in place of a line for each task that is done.
        interrupted: called at the first Ctrl-C: the process may end at once from then on, without an `__exit__`.

    Raises:
        CloisterError: what `Node.run` raises, and mistakes in the file's certificates or its device.
    """
    material = client_tls(settings, document, say)
    if material is not None and settings.tls is not None:
        warning = identity.expiry_warning(material().certificate, Path(settings.tls.certificate))
        if warning is not None:
            say(f"warning: {warning}")
    resolve_device(settings.device)
    node = Node(settings, tls=material, wait_s=wait_s, say=say, ask=ask, step=step)
    return asyncio.run(_until_interrupted(node, say, interrupted))


async def _until_interrupted(node: Node, say: Say, interrupted: Callable[[], None]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in INTERRUPTS:  # by the signal module, since loops on Windows take none
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    work = asyncio.create_task(node.run())
    interrupt = asyncio.create_task(stop.wait())
    await asyncio.wait([work, interrupt], return_when=asyncio.FIRST_COMPLETED)
    interrupt.cancel()
    if work.done():
        say(f"the run is over: {work.result()}")
        return 0
    interrupted()
    for number in INTERRUPTS:  # a second one does not wait for the task in hand
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
