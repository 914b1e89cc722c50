"""The whole examination of a client file, from the link to the plan."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from client.doctor import account, link, machine, table
from client.settings import ClientFile, load_client_file
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import ConfigError
from common.findings import Finding, mistakes, ok, warning, wrong


def examine(document: Path) -> Iterator[Finding]:
    """Looks at all that a client needs for a run, in the order in which a person would mend it. Findings come as they
    are made, since some wait for a network. The server is asked for its document and told nothing; nothing is written.

    Args:
        document: the client file.
    """
    try:
        settings = load_client_file(document)
    except ConfigError as error:
        yield from mistakes("client file", error, "docs/client-file.md has every key")
        return
    yield ok("client file", f"{document}: dataset {settings.data.name}")
    told = yield from link.look(settings, document)
    federation = yield from _federation(settings, told)
    yield from machine.look(settings, federation)
    if federation is None:
        yield warning(
            "table",
            "not examined: no server has told its document, and the client file names no copy",
            "run this again once the server is up, or name your copy as `federation:` in the client file",
        )
        yield from account.look(settings, document)
        return
    dataset = yield from table.look(settings, federation)
    yield from account.look(settings, document, federation, dataset)


def _federation(settings: ClientFile, told: Federation | None) -> Generator[Finding, None, Federation | None]:
    """The document to examine by: the server's, or where there is none the owner's copy."""
    if settings.federation is None:
        return told
    try:
        own = federations.load(Path(settings.federation))
    except ConfigError as error:
        yield from mistakes("your copy", error, "mend it, or ask whoever coordinates for a new one")
        return told
    if told is None:
        yield warning(
            "your copy", f"the rest is examined by it, fingerprint {own.fingerprint}; the server may have another"
        )
        return own
    if own.fingerprint == told.fingerprint:
        yield ok("your copy", "is the server's document")
    else:
        yield wrong(
            "your copy",
            f"{settings.federation} has fingerprint {own.fingerprint}, and is not the server's document",
            "compare the two with whoever coordinates; the rest is examined by the server's",
        )
    return told
