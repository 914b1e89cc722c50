"""Who may open the page: any process of this machine on loopback; elsewhere whoever has the token, over TLS.

A token is given once, in the page's address. From then on the browser shows a cookie that was made from it, and from
which it cannot be had.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import logging
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from common.certificates import files
from common.certificates.identity import ServerIdentity
from common.errors import CertificateError, ConfigError
from common.wire.address import Address, parse_option
from common.wire.channel import is_loopback

TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")  # what an address may hold as it is

log = logging.getLogger("cloister.server")


@dataclass(frozen=True)
class Access:
    """Where the page is, and for whom. Without a token it is for all who can reach it."""

    address: Address
    token: str = ""
    identity: ServerIdentity | None = None  # whose names pages may use, where there is TLS
    certificates: Path | None = None

    @property
    def has_tls(self) -> bool:
        return self.identity is not None

    def is_ours(self, host: str) -> bool:
        """May a page ask for us by this Host header? Another name that leads here (DNS rebinding) is not ours."""
        name = _name_in(host)
        if is_loopback(name):
            return True
        return self.identity is not None and files.is_for(name, _names_of(self.identity.material.certificate))

    def accepts(self, token: str) -> bool:
        """Is it the token? Takes the same time for any that is not."""
        return hmac.compare_digest(token.encode(), self.token.encode())

    @property
    def cookie(self) -> tuple[str, str]:
        """What a browser keeps: name and value. All ports of a host share cookies, so the name differs by token."""
        name, value = (hmac.new(self.token.encode(), use, hashlib.sha256).hexdigest() for use in (b"name", b"value"))
        return f"{'__Host-' if self.has_tls else ''}cloister-{name[:8]}", value

    def knows(self, cookies: dict[str, str]) -> bool:
        """Do these cookies have ours?"""
        name, value = self.cookie
        return hmac.compare_digest(cookies.get(name, "").encode(), value.encode())

    def context(self) -> ssl.SSLContext | None:
        """For TLS 1.3 with the server's certificate. Raises `CertificateError`."""
        if self.certificates is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.load_certificate(context)
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Serves new connections with the certificate as it is now. Raises `CertificateError`."""
        assert self.certificates is not None
        certificate = self.certificates / "server.pem"
        try:
            context.load_cert_chain(certificate, self.certificates / "server.key", password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise CertificateError(f"{certificate}: cannot be used for the dashboard ({error})") from error


def access(
    dashboard: str, *, token_file: Path | None, identity: ServerIdentity | None, certificates: Path | None
) -> Access:
    """What the command line says of a dashboard. Raises `ConfigError`, one line, if that is too little to be safe."""
    address = parse_option("--dashboard", dashboard, lowest=0)
    token = "" if token_file is None else _read_token(token_file)
    if is_loopback(address.host):
        return Access(address, token)
    missing = ["--certificates FOLDER (for TLS)"] if identity is None else []
    missing += ["--dashboard-token FILE (a secret that whoever opens the page must know)"] if not token else []
    if missing:
        raise ConfigError(
            [
                f"--dashboard {address}: others than this machine can reach it: give {' and '.join(missing)}, or serve "
                f"127.0.0.1:{address.port} alone"
            ]
        )
    return Access(address, token, identity, certificates)


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(1 << 16).decode("ascii", "replace").strip()
    except OSError as error:
        raise ConfigError([f"--dashboard-token {path}: cannot be read ({error.strerror})"]) from error
    if not TOKEN.fullmatch(text):
        raise ConfigError(
            [
                f"--dashboard-token {path}: must be one line of 16 to 256 letters, digits and . _ ~ -, made at random; "
                f"`openssl rand -hex 32 > {path}` makes one"
            ]
        )
    if (said := files.open_to_others(path)) is not None:
        log.warning("%s; %s", *said)
    return text


def _name_in(host: str) -> str:
    """The name of a Host header, without a port: as people write it, and IPv6 without brackets."""
    name = re.sub(r":\d*$", "", host) if not host.endswith("]") else host
    return name.strip("[]").lower().rstrip(".")


@functools.lru_cache(maxsize=2)
def _names_of(pem: bytes) -> frozenset[str]:
    """The names and addresses that a certificate is for."""
    return frozenset(files.hosts(files.parse(pem, "server.pem")))


def url(access: Access, port: int) -> str:
    """The address to open, for a person."""
    host = access.address.host
    if not is_loopback(host) and _is_any(host):
        names = sorted(_names_of(access.identity.material.certificate)) if access.identity else []
        named = [name for name in names if not is_loopback(name)]
        host = next((f"[{name}]" if ":" in name else name for name in named), host)
    return f"http{'s' if access.has_tls else ''}://{host}:{port}/"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False
