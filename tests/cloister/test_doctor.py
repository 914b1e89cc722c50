"""`cloister doctor` as it is typed."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

import cloister
from tests.client.doctor.support import client_file
from tests.client.doctor.test_link import made
from tests.support import PRIVATE, document


def run(*arguments: object):
    return CliRunner().invoke(cloister.app, ["doctor", *map(str, arguments)])


def test_a_client_that_is_not_ready_exits_with_one_and_says_what_to_do(tmp_path):
    done = run(client_file(tmp_path))
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith("ok      client file")
    place = next(i for i, line in enumerate(lines) if line.startswith("wrong   server"))
    assert lines[place + 1].strip().startswith("-> ask whoever coordinates")
    assert lines[-1] == "not ready: 1 wrong"


def test_json_has_the_verdict_and_every_finding(tmp_path):
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    certs = made(tmp_path / "certs")
    done = run(tmp_path / "federation.yaml", "--certificates", certs, "--address", "127.0.0.1:0", "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ready"]) == (0, True)
    assert set(told["findings"][0]) == {"what", "state", "said", "remedy"}
    assert {f["state"] for f in told["findings"]} == {
        "ok",
        "warning",
    }  # one certificate of a client, and two are needed


def test_what_a_file_says_is_shown_as_text_and_moves_no_cursor(tmp_path):
    path = client_file(tmp_path, state="[red]state\x1b[2J")
    output = run(path).output
    assert "[red]state" in output and "\x1b" not in output


def test_certificates_belong_to_the_coordinators_side(tmp_path):
    done = run(client_file(tmp_path), "--certificates", tmp_path)
    assert done.exit_code == 2 and "--certificates is for a federation.yaml" in done.output


def test_a_file_that_is_not_there_is_bad_input_and_no_finding(tmp_path):
    done = run(tmp_path / "client.yaml")
    assert done.exit_code == 2 and "client.yaml: no such file; give a client.yaml or a federation.yaml" in done.output


@pytest.mark.parametrize("content", ["", "- 1", "name: [", "nonsense: true"])
def test_a_file_that_is_neither_is_wrong_and_not_ready(tmp_path, content):
    (tmp_path / "some.yaml").write_text(content)
    done = run(tmp_path / "some.yaml", "--address", "127.0.0.1:0")
    assert done.exit_code == 1 and "wrong   federation" in done.output
