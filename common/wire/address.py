"""Addresses as people write them: HOST:PORT, with IPv6 in brackets."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from common.errors import ConfigError

HIGHEST_PORT = 65_535
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")


class Address(NamedTuple):
    """A host, in brackets if it is IPv6, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse(text: str, *, lowest: int = 1) -> Address:
    """Reads an address.

    Args:
        lowest: port that is accepted: 0 where one listens, which takes a free one.

    Raises:
        ValueError: it is none; the message says what one is, without what was found.
    """
    host, separator, port = text.rpartition(":")
    scheme, _, rest = text.rpartition("://")
    if scheme:
        raise ValueError(f"must be HOST:PORT, without {scheme}:// before it{_as_in(rest.rstrip('/'))}")
    if not separator or text.endswith("]"):
        raise ValueError(f"must be HOST:PORT, and lacks the port{_as_in(f'{text}:8443')}")
    if not port.isascii() or not port.isdecimal() or not lowest <= int(port) <= HIGHEST_PORT:
        raise ValueError(f"must be HOST:PORT, with a port from {lowest} to {HIGHEST_PORT}")
    if _is_ipv6(host):
        raise ValueError(f"must be HOST:PORT, with IPv6 in brackets, as in [{host}]:{port}")
    if not HOST.fullmatch(host) and not (host.startswith("[") and host.endswith("]") and _is_ipv6(host[1:-1])):
        raise ValueError("must be HOST:PORT, with a name or an IP address for a host")
    return Address(host, int(port))


def parse_option(option: str, text: str, *, lowest: int = 1) -> Address:
    """Reads an address from the command line. Raises `ConfigError`, which names the option."""
    try:
        return parse(text, lowest=lowest)
    except ValueError as error:
        raise ConfigError([f"{option} {error} (got {text})"]) from error


def checked(text: str) -> str:
    """An address as it stands in a document. Raises `ValueError` as `parse` does."""
    parse(text)
    return text


def _as_in(example: str) -> str:
    """An example, if it is an address."""
    try:
        parse(example)
    except ValueError:
        return ""
    return f", as in {example}"


def _is_ipv6(text: str) -> bool:
    """An interface may be named behind a %, by plain characters alone: the library takes any, and a host gets into
    documents and scripts."""
    try:
        scope = ipaddress.IPv6Address(text).scope_id
    except ValueError:
        return False
    return scope is None or HOST.fullmatch(scope) is not None
