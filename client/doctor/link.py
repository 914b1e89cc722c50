"""The way to the server: its name, its port, who it is by its certificate, and what it tells of the federation."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from cryptography import x509

from client.calls import calling
from client.settings import ClientFile, TLSFiles
from client.tls import client_tls
from common.certificates import files, identity
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import CertificateError, CloisterError, ConfigError
from common.findings import Finding, ok, warning, wrong
from common.text import shown
from common.wire import address
from common.wire import session_pb2 as pb
from common.wire.address import Address

PATIENCE_S = 5.0
MOST_SKEW_S = 60.0  # between two clocks, before it is worth a word


def look(settings: ClientFile, document: Path) -> Generator[Finding, None, Federation | None]:
    """Goes the way that a client goes to its server, as far as it leads. Returns the document that the server told, or
    None. `document` is the settings' file."""
    yield from _own_files(settings)
    try:
        read = client_tls(settings, document)
        material = read and read()
    except (CertificateError, ConfigError) as error:
        yield wrong("TLS", error, "ask whoever coordinates for ca.pem and your certificate and key")
        return None
    server = address.parse(settings.server)
    if (problem := _unreachable(server)) is not None:
        yield problem
        return None
    yield ok("server", f"{server} is there")
    if settings.tls is None:
        yield ok("TLS", "none: plain text on loopback")
    else:
        yield from _certificate(server, settings.tls)
    began = time.time()
    try:
        with calling(settings.server, material) as stub:
            reply = stub.Document(pb.DocumentRequest(name=settings.name or ""), timeout=PATIENCE_S)
        federation = federations.from_canonical(reply.federation)
    except CloisterError as error:
        yield wrong("federation", error, "whoever runs the server finds the reason in its log")
        return None
    yield ok("federation", f"{federation.name}, fingerprint {federation.fingerprint}; you are {shown(reply.name, 64)}")
    yield from _versions(shown(reply.version, 40))
    yield _clock(reply.time - (began + time.time()) / 2)
    return federation


def _own_files(settings: ClientFile) -> Iterator[Finding]:
    """What of our own TLS files is worth a word though they can be used."""
    if settings.tls is None:
        return
    for path in (Path(settings.tls.ca), Path(settings.tls.certificate)):
        try:
            if said := identity.expiry_warning(files.read(path), path):
                yield warning("TLS", said)
        except CertificateError:
            return  # whoever loads them all says so
    if exposed := files.open_to_others(Path(settings.tls.key)):
        yield warning("TLS", *exposed)


def _unreachable(server: Address) -> Finding | None:
    host = server.host.strip("[]")
    try:
        with socket.create_connection((host, server.port), timeout=PATIENCE_S):
            return None
    except (socket.gaierror, UnicodeError):  # the latter of what cannot be a name: a..b
        return wrong(
            "server", f"{host}: no such name", "check `server:` in the client file, and whether a VPN must be on"
        )
    except ConnectionRefusedError:
        return wrong(
            "server",
            f"{server} refuses the connection: nothing listens there",
            "ask whoever coordinates whether the server runs, and on which port",
        )
    except (TimeoutError, OSError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else f"{error.strerror or error}"
        return wrong(
            "server",
            f"{server}: {why} within {PATIENCE_S:g} s",
            "a firewall may drop the way out: it must let this machine open TCP connections to that port",
        )


def _certificate(server: Address, ours: TLSFiles) -> Iterator[Finding]:
    """The server's certificate, as it shows it: from whom, for which names, until when. The call that follows decides;
    this says why."""
    try:
        found = _shown_by(server)
    except ssl.SSLError as error:
        yield wrong("TLS", f"{server} does not speak TLS ({error.reason})", "is that the server's port?")
        return
    except (OSError, CertificateError) as error:
        yield wrong("TLS", f"{server}: no certificate was shown ({error})")
        return
    names, until = files.hosts(found), found.not_valid_after_utc
    authority = files.parse(files.read(Path(ours.ca)), ours.ca)
    if not files.is_issued_by(found, authority):
        yield wrong(
            "TLS",
            f"the server's certificate is not from the authority in {ours.ca}",
            "compare ca.pem with that of whoever coordinates, over another way than the network",
        )
    elif not files.is_for(server.host.strip("[]"), names):
        yield wrong(
            "TLS",
            f"the server's certificate is for {', '.join(names) or 'no host'}, and not for {server.host}",
            "use one of those names in `server:`, or have `cloister certs server` make one for this name",
        )
    elif not found.not_valid_before_utc <= datetime.now(UTC) <= until:
        yield wrong(
            "TLS",
            f"the server's certificate is valid from {found.not_valid_before_utc:%Y-%m-%d} to {until:%Y-%m-%d}, and by "
            f"this clock it is {datetime.now(UTC):%Y-%m-%d}",
            "set the clock, or ask whoever coordinates for a new certificate of the server",
        )
    else:
        yield ok("TLS", f"the server's certificate is for {', '.join(names)}, valid until {until:%Y-%m-%d}")


def _shown_by(server: Address) -> x509.Certificate:
    """The certificate that a server shows, not verified: so it is shown none of ours, which says who we are. In TLS 1.3
    a client is through with its part before a server can mind. Raises `CertificateError` if it is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host = server.host.strip("[]")
    with (
        socket.create_connection((host, server.port), timeout=PATIENCE_S) as link,
        context.wrap_socket(link, server_hostname=host) as secured,
    ):
        shown_to_us = secured.getpeercert(binary_form=True)
    return files.parse(ssl.DER_cert_to_PEM_cert(shown_to_us or b"").encode(), "the server's")


def _versions(theirs: str) -> Iterator[Finding]:
    ours = version("cloister")
    if theirs != ours:
        yield warning("version", f"the server runs Cloister {theirs}, this client {ours}", "use the same on both sides")


def _clock(ahead_s: float) -> Finding:
    """`ahead_s`: by how much the server's clock is before ours."""
    if abs(ahead_s) <= MOST_SKEW_S:
        return ok("clock", f"within {max(1, round(abs(ahead_s)))} s of the server's")
    side = "behind" if ahead_s > 0 else "ahead of"
    return warning(
        "clock",
        f"{abs(ahead_s):,.0f} s {side} the server's",
        "let both machines take their time from the network: certificates and the ledger's dates go by it",
    )
