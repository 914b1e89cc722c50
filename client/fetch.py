"""The model of a run, from its server, for a client that was away when the run ended."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from client import kept
from client.calls import calling
from client.settings import ClientFile
from client.tls import client_tls
from common.errors import ConnectionFailed, ModelError
from common.inference import saved
from common.inference.saved import SavedModel
from common.text import is_name
from common.wire import session_pb2 as pb
from common.wire.protocol import LARGEST_CONTENT

PATIENCE_S = 600.0  # for the whole model


def fetch(settings: ClientFile, document: Path) -> tuple[SavedModel, Path]:
    """Asks the server for the model after the last complete round, and keeps it. `document` is the settings' file.

    Returns:
        the model, and where it is kept. If we have a later one of its run, that stays.

    Raises:
        ConnectionFailed: nobody answers there; the server of a finished run is gone, unless it stays.
        CertificateError: the two sides do not accept each other's certificates.
        ModelError: the server has no model yet, or sent what is none.
    """
    read = client_tls(settings, document)
    content = bytearray()
    try:
        with calling(settings.server, None if read is None else read()) as server:
            for chunk in server.Fetch(pb.FetchRequest(name=settings.name or ""), timeout=PATIENCE_S):
                content += chunk.data
                if len(content) > LARGEST_CONTENT:
                    raise ModelError(
                        f"{settings.server}: sends more than {LARGEST_CONTENT:,} bytes; no model has those"
                    )
    except ConnectionFailed as error:
        raise ConnectionFailed(
            f"{error}; the server of a run that is over is gone, unless whoever ran it lets it stay: "
            "`cloister serve --resume RUN_DIR --stay`"
        ) from error
    model = saved.from_bytes(bytes(content), settings.server)
    if not is_name(model.run):
        raise ModelError(f"{settings.server}: sent the model of a run without a name that can be shown")
    path = kept.place(settings.models, model.run)
    with suppress(ModelError):
        model = _beside(saved.from_bytes(saved.read_bytes(path), str(path)), model)
    return model, kept.keep(settings.models, model)


def _beside(ours: SavedModel, fetched: SavedModel) -> SavedModel:
    """A fetched model in place of the one that we have of the same run: never an older one, and with what we stated."""
    if ours.round > fetched.round:
        return ours
    if not fetched.privacy:  # the run goes on, and nothing is stated yet
        return replace(fetched, privacy=ours.privacy)
    row = ours.privacy.get("row")
    return kept.with_own(fetched, row.get("per_client", {}) if isinstance(row, Mapping) else {})
