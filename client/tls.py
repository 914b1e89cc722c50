"""How a client shows who it is: its TLS files, or on loopback its name alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.settings import ClientFile, TLSFiles
from common.certificates import identity
from common.certificates.identity import TLSMaterial
from common.errors import CertificateError, ConfigError
from common.wire.address import parse
from common.wire.channel import is_loopback

Say = Callable[[str], None]


def client_tls(settings: ClientFile, document: Path, say: Say = lambda text: None) -> Callable[[], TLSMaterial] | None:
    """What reads a client's TLS files, at each connection; None for plain text. `document` is the settings' file.

    Raises:
        CertificateError: plain text would leave the machine; and whoever calls what is returned, for damaged files.
        ConfigError: without TLS the client has no name.
    """
    if settings.tls is not None:
        return _reread(settings.tls, say)
    host = parse(settings.server).host
    if not is_loopback(host):
        raise CertificateError(f"{document}: tls is null, and plain text is for loopback only, not {host}")
    if settings.name is None:
        raise ConfigError([f"{document}: name is missing; without TLS no certificate says who you are"])
    return None


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
            say(f"warning: {error}; the earlier certificate stays in use")
        return held[0]

    return read
