from __future__ import annotations

from pathlib import Path

import pytest

from client.settings import TLSFiles
from client.tls import _reread
from common.certificates import authority
from common.errors import CertificateError


def test_a_renewed_certificate_is_taken_and_a_half_replaced_one_is_not(tmp_path: Path):
    authority.create_authority(tmp_path)
    authority.create_client(tmp_path, "ada")
    said: list[str] = []
    paths = {"ca": "ca.pem", "certificate": "ada.pem", "key": "ada.key"}
    read = _reread(TLSFiles(**{k: str(tmp_path / v) for k, v in paths.items()}), said.append)
    first = read()
    (tmp_path / "ada.pem").unlink()
    (tmp_path / "ada.key").rename(tmp_path / "kept.key")
    assert read() == first
    assert "ada.pem: cannot be read" in said[0] and "the earlier certificate stays in use" in said[0]
    authority.create_client(tmp_path, "ada")
    assert read() != first


def test_without_any_certificate_a_client_does_not_start(tmp_path: Path):
    missing = str(tmp_path / "ada.pem")
    with pytest.raises(CertificateError, match=r"ada\.pem: cannot be read"):
        _reread(TLSFiles(ca=missing, certificate=missing, key=missing), print)()
