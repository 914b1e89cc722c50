"""How the two ends of a link are set up: keepalive, sizes, and plain text on loopback only."""

from __future__ import annotations

import ipaddress

from common.wire.protocol import CHUNK

# A dead peer is noticed within both together, also by routers that forget idle connections.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 20_000, 20_000
_BOTH = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 2 * CHUNK),
]
CLIENT_OPTIONS = [*_BOTH, ("grpc.http2.max_pings_without_data", 0)]
SERVER_OPTIONS = [
    *_BOTH,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.max_concurrent_streams", 4),  # of one connection, which needs one
    ("grpc.max_connection_idle_ms", 60_000),  # a connection without a session
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a port that is in use is an error
]


def is_loopback(host: str) -> bool:
    """Does this host name mean the machine itself? Plain text is for it alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
