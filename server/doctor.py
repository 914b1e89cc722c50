"""What whoever coordinates wants to know before a server starts: the document, certificates, port and disk."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from common.certificates import files
from common.certificates.files import Kind
from common.certificates.identity import ServerIdentity
from common.certificates.listing import Listed, State, certificates_in
from common.document import federation as federations
from common.document.federation import Federation
from common.document.strategy import Installed, title
from common.errors import CertificateError, ConfigError, PrivacyError
from common.findings import Finding, mistakes, ok, warning, wrong
from common.privacy import reach
from common.privacy.releases import client_releases, evaluation_release
from common.text import in_bytes
from common.wire.address import parse_option

MODELS = 6  # copies of a model in a run folder at most: the last, two checkpoints with a strategy's moments, a draft
EVENT_BYTES = 20_000  # a round's line, with a hundred names
LEAST_ROOM = 16 << 20
REPORT = ("altair", "jinja2", "vl_convert")  # what the extra `report` brings


def examine(document: Path, *, certificates: Path | None, address: str, runs: Path = Path("runs")) -> Iterator[Finding]:
    """Looks at all that a server needs. Writes nothing.

    Args:
        document: federation.yaml.
        certificates: the folder that `cloister serve --certificates` is to be given; None for plain text on loopback.
        address: HOST:PORT where it is to listen.
        runs: where run folders are made.

    Raises:
        ConfigError: `address` is none.
    """
    at = parse_option("--address", address, lowest=0)
    try:
        federation = federations.load(document)
    except ConfigError as error:
        yield from mistakes("federation", error, "docs/federation-file.md has every key")
        federation = None
    if federation is not None:
        yield ok("federation", f"{federation.name}, fingerprint {federation.fingerprint}")
        yield from _privacy(federation)
        yield from _strategy(federation)
    if certificates is not None:
        yield from _certificates(certificates, federation)
    yield _port(at.host.strip("[]"), at.port)
    yield _room(next(folder for folder in (runs.resolve(), *runs.resolve().parents) if folder.is_dir()), federation)
    missing = [name for name in REPORT if find_spec(name) is None]
    if missing:
        yield warning(
            "report", "packages for report.html are missing", "pip install 'cloister[report]', or --no-report"
        )


def _privacy(federation: Federation) -> Iterator[Finding]:
    row, client = federation.privacy.row, federation.privacy.client
    if row is None and client is None:
        yield warning("privacy", "none: updates are exact and can reveal rows", "set privacy.row or privacy.client")
        return
    try:
        evaluation_release(federation)
        noise = client_releases(federation)[0].noise_multiplier if client else 0.0
    except PrivacyError as error:
        yield wrong("privacy", error, "`cloister plan` shows what fits")
        return
    if row is not None:
        yield ok("privacy", f"each row: epsilon {row.epsilon:g} at delta {row.delta:g}, by the clients")
    if client is not None:
        yield ok(
            "privacy",
            f"each client: epsilon {client.epsilon:g} at delta {client.delta:g}, by this server, noise multiplier "
            f"{noise:.2f}",
        )
    if said := reach.warning(federation):
        yield warning("privacy", said.removeprefix("warning: "))


def _strategy(federation: Federation) -> Iterator[Finding]:
    """Of one that a package has to bring."""
    if not isinstance(federation.strategy, Installed):
        return
    from server.rounds import strategies  # Flower

    try:
        strategies.build(federation)
    except ConfigError as error:
        yield from mistakes("strategy", error, "docs/extending.md")
    else:
        yield ok("strategy", title(federation.strategy))


def _certificates(folder: Path, federation: Federation | None) -> Iterator[Finding]:
    try:
        identity = ServerIdentity(folder)
        listed = certificates_in(folder)
    except CertificateError as error:
        yield wrong("certificates", error)
        return
    for said in identity.warnings():
        yield warning("certificates", said)
    hosts = files.hosts(files.parse(identity.material.certificate, folder / "server.pem"))
    yield ok(
        "certificates", f"the server's is for {', '.join(hosts) or 'no host'}: clients must call it by one of these"
    )
    for name in ("server.key", "ca.key"):
        if said_of_key := files.open_to_others(folder / name):
            yield warning("certificates", *said_of_key)
    yield from _clients([one for one in listed if one.kind == Kind.CLIENT], federation)


def _clients(listed: list[Listed], federation: Federation | None) -> Iterator[Finding]:
    """Of clients whose certificate has a copy here: a server needs none, and those elsewhere are not seen."""
    good = [one for one in listed if one.state in (State.VALID, State.EXPIRES_SOON)]
    for one in listed:
        if one.state in (State.EXPIRES_SOON, State.EXPIRED, State.NOT_YET_VALID):
            yield warning("clients", f"{one.file}: {one.state}, until {one.expires:%Y-%m-%d}")
    least = federation.strategy.min_clients if federation else 1
    said = f"{len(good)} certificates of clients are here, and a round needs {least}"
    if len(good) < least:
        yield warning("clients", said, "`cloister certs client NAME` makes one for each; others may lie elsewhere")
    else:
        yield ok("clients", said)


def _port(host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            if os.name == "posix":  # elsewhere it would take a port that is another's
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        remedy = "another process has it, perhaps an earlier server; end that, or give another --address"
        return wrong("port", f"{host}:{port} cannot be listened on: {error.strerror or error}", remedy)
    return ok("port", f"{host}:{port} is free; clients must be let in there")


def _room(folder: Path, federation: Federation | None) -> Finding:
    needed = LEAST_ROOM
    if federation is not None:
        needed += MODELS * federation.model_bytes + EVENT_BYTES * federation.training.rounds
    free = shutil.disk_usage(folder).free
    said = f"{in_bytes(free)} free for run folders in {folder}, and one needs up to {in_bytes(needed)}"
    return ok("disk", said) if free >= needed else wrong("disk", said, "make room, or give --out on another disk")
