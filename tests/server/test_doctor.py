"""What a coordinator's examination finds before a server starts."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from common.certificates import authority
from common.errors import ConfigError
from common.findings import Finding, State, is_ready
from server import doctor
from tests.client.doctor.support import of
from tests.client.doctor.test_link import made
from tests.support import PRIVATE, WHOLE, document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made(tmp_path / "certs")
    authority.create_client(tmp_path / "certs", "ben")
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    return tmp_path


def examined(folder: Path, address: str = "127.0.0.1:0") -> list[Finding]:
    return list(doctor.examine(folder / "federation.yaml", certificates=folder / "certs", address=address, runs=folder))


def test_a_server_that_is_ready_says_for_whom_its_certificate_is_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    found = examined(folder)
    assert is_ready(found), of(found, State.WRONG)
    assert sorted(folder.rglob("*")) == before
    said = {f.what: f.said for f in found}
    assert list(said) == ["federation", "privacy", "certificates", "clients", "port", "disk"]
    assert "for 127.0.0.1: clients must call it by one of these" in said["certificates"]
    assert said["clients"] == "2 certificates of clients are here, and a round needs 2"


def test_mistakes_in_a_document_are_all_told_and_the_rest_is_examined(folder):
    (folder / "federation.yaml").write_text(yaml.safe_dump(document(training__rounds=0, training__batch_size=0)))
    wrong = of(found := examined(folder), State.WRONG)
    assert len(wrong) == 2 and all(line.startswith("federation: ") for line in wrong)
    assert "port" in [f.what for f in found]


def test_no_privacy_is_a_warning_and_whole_clients_are_told_with_their_noise(folder):
    (folder / "federation.yaml").write_text(yaml.safe_dump(document()))
    assert any(line.startswith("privacy: none") for line in of(examined(folder), State.WARNING))
    (folder / "federation.yaml").write_text(yaml.safe_dump(document(**WHOLE)))
    assert any("each client: epsilon" in line and "noise multiplier" in line for line in of(examined(folder), State.OK))


def test_evaluations_that_cost_more_than_epsilon_are_wrong(folder):
    privacy = {**PRIVATE, "training__rounds": 40, "privacy__evaluation": {"every": 1, "noise": 3.0}}
    (folder / "federation.yaml").write_text(yaml.safe_dump(document(**privacy)))
    (wrong,) = of(examined(folder), State.WRONG)
    assert "40 evaluations at noise 3 cost epsilon" in wrong


def test_too_few_certificates_and_missing_ones_are_told(folder):
    authority.revoke(folder / "certs", "ben")
    assert any(
        "1 certificates of clients are here, and a round needs 2" in w for w in of(examined(folder), State.WARNING)
    )
    (folder / "certs" / "server.pem").unlink()
    (wrong,) = of(examined(folder), State.WRONG)
    assert "server.pem: cannot be read" in wrong


def test_a_port_that_is_taken_is_wrong(folder):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        (wrong,) = of(examined(folder, f"127.0.0.1:{port}"), State.WRONG)
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use -> another process has it" in wrong


def test_an_address_that_is_none_is_an_error_of_the_command_line(folder):
    with pytest.raises(ConfigError, match="--address must be HOST:PORT"):
        examined(folder, "nowhere")


def test_a_disk_with_too_little_room_is_wrong(folder, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_ROOM", 1 << 60)
    (wrong,) = of(examined(folder), State.WRONG)
    assert "free for run folders" in wrong and "make room" in wrong


def test_a_report_that_cannot_be_drawn_is_a_warning(folder, monkeypatch):
    monkeypatch.setattr(doctor, "REPORT", ("altair", "a_package_that_nobody_has"))
    assert any("packages for report.html are missing" in line for line in of(examined(folder), State.WARNING))
