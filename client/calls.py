"""Single calls to a server, outside a session: gRPC's errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from common.certificates import identity
from common.certificates.identity import TLSMaterial
from common.errors import CertificateError, ConnectionFailed, ModelError
from common.text import shown
from common.wire import session_pb2_grpc as service
from common.wire.channel import CLIENT_OPTIONS


@contextmanager
def calling(address: str, tls: TLSMaterial | None) -> Iterator[service.SessionStub]:
    """A server to call. `tls` None is plain text, for loopback.

    Raises:
        CertificateError: the two sides do not accept each other's certificates.
        ConnectionFailed: nobody answers there, or not in time.
        ModelError: what was asked for is not there.
    """
    if tls is None:
        channel = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
    else:
        credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
        channel = grpc.secure_channel(address, credentials, options=CLIENT_OPTIONS)
    with channel:
        try:
            yield service.SessionStub(channel)
        except grpc.RpcError as error:
            details = shown(str(error.details() or error.code().name).splitlines()[0], 160)
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise CertificateError(f"{address}: the server does not accept this certificate") from error
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise ModelError(f"{address}: {details}") from error
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise ConnectionFailed(
                    f"{address}: is no server that knows this call: an older Cloister, or something else"
                ) from error
            if (fault := identity.fault_in(error.details())) is not None:
                raise CertificateError(f"{address}: the server is not accepted: {fault}") from error
            raise ConnectionFailed(f"{address}: no answer ({details})") from error
