from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

import cloister
from common.errors import ConfigError
from common.wire.address import Address, parse, parse_option
from tests.support import ROOT


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("localhost:8443", "localhost", 8443),
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("fl.example.org:65535", "fl.example.org", 65535),
        ("my_server-2:80", "my_server-2", 80),
        ("[::1]:8443", "[::1]", 8443),
        ("[2001:db8::7]:443", "[2001:db8::7]", 443),
        ("[fe80::1%eth0]:443", "[fe80::1%eth0]", 443),
    ],
)
def test_a_host_and_a_port_are_an_address_and_are_written_as_they_were(text, host, port):
    assert parse(text) == Address(host, port)
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("https://localhost:8443", "must be HOST:PORT, without https:// before it, as in localhost:8443"),
        ("grpc://fl.example.org/", "must be HOST:PORT, without grpc:// before it"),
        ("127.0.0.1", "must be HOST:PORT, and lacks the port, as in 127.0.0.1:8443"),
        ("[::1]", "must be HOST:PORT, and lacks the port, as in [::1]:8443"),
        ("localhost:99999", "must be HOST:PORT, with a port from 1 to 65535"),
        ("localhost:0", "must be HOST:PORT, with a port from 1 to 65535"),
        ("localhost:", "must be HOST:PORT, with a port from 1 to 65535"),
        ("localhost:-1", "must be HOST:PORT, with a port from 1 to 65535"),
        ("localhost:8443/x", "must be HOST:PORT, with a port from 1 to 65535"),
        ("localhost:٣", "must be HOST:PORT, with a port from 1 to 65535"),
        ("::1:8443", "must be HOST:PORT, with IPv6 in brackets, as in [::1]:8443"),
        ("2001:db8::7:443", "must be HOST:PORT, with IPv6 in brackets, as in [2001:db8::7]:443"),
        (":8443", "must be HOST:PORT, with a name or an IP address for a host"),
        ("a b:8443", "must be HOST:PORT, with a name or an IP address for a host"),
        ("[localhost]:8443", "must be HOST:PORT, with a name or an IP address for a host"),
        ("user@host:8443", "must be HOST:PORT, with a name or an IP address for a host"),
        ("[fe80::1%$(date)]:8443", "must be HOST:PORT, with a name or an IP address for a host"),
        ("", "must be HOST:PORT, and lacks the port"),
    ],
)
def test_what_is_no_address_is_told_what_one_is(text, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse(text)


def test_where_one_listens_port_0_is_a_free_one():
    assert parse("127.0.0.1:0", lowest=0).port == 0


def test_the_command_line_names_the_option():
    with pytest.raises(ConfigError, match=r"^--address must be HOST:PORT, and lacks the port, as in h:8443 \(got h\)$"):
        parse_option("--address", "h")


@pytest.mark.parametrize(
    "verb",
    [
        ["serve", "simulations/heart/federation.yaml", "--insecure", "--address", "localhost"],
        ["serve", "simulations/heart/federation.yaml", "--certificates", "certs", "--address", "127.0.0.1"],
        ["status", "localhost"],
        ["status", "https://localhost:8443"],
    ],
)
def test_every_verb_refuses_what_is_no_address_and_writes_nothing(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cloister.app, [str(ROOT / part) if part.endswith(".yaml") else part for part in verb])
    assert done.exit_code == 2
    assert "must be HOST:PORT" in done.output
    assert list(tmp_path.iterdir()) == []
