"""`cloister check` knows a document of either kind, and says what is in it or what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cloister.check import check_file
from common.document import federation as federations
from common.errors import ConfigError
from common.privacy import reach
from tests.support import PRIVATE, document

CLIENT: dict[str, Any] = {
    "server": "127.0.0.1:8443",
    "tls": None,
    "data": {"path": "t.csv", "name": "t"},
    "state": "state",
    "policy": {"epsilon": 8.0, "delta": 1e-3},
}


def written(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "it.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_federation_is_summed_up(tmp_path):
    path = written(tmp_path, document(**PRIVATE, model__hidden=[8, 4]))
    # Inputs: a and b are one each; c is red, green or other.
    assert check_file(path) == [
        f"{path}: a federation, valid",
        f"fingerprint {federations.load(path).fingerprint}",
        "model 5 - 8 - 4 - 2, relu; cross_entropy, sgd at 0.1",
        "3 rounds of 2 steps, batch 8; fedavg, at least 2 clients",
        "privacy of each row: epsilon 4, delta 0.001, clip 1",
        reach.warning(federations.load(path)),
    ]


def test_a_federation_without_privacy_says_so(tmp_path):
    lines = check_file(written(tmp_path, document(training__local_steps=..., training__local_epochs=2)))
    assert "3 rounds of 2 epochs, batch 8; fedavg, at least 2 clients" in lines
    assert lines[-1] == "privacy of nothing: no differential privacy"


def test_an_early_end_and_packed_updates_are_told(tmp_path):
    rule = {"metric": "accuracy", "patience": 4}
    lines = check_file(written(tmp_path, document(training__early_stopping=rule, wire={"dtype": "int8"})))
    assert "ends early when accuracy was no better in 4 evaluations" in lines
    assert "updates travel in int8" in lines


def test_the_model_is_shown_as_it_is_built(tmp_path):
    lines = check_file(written(tmp_path, document(training__loss="binary_cross_entropy")))
    assert "model 5 - 8 - 1, relu; binary_cross_entropy, sgd at 0.1" in lines


def test_groups_and_targets_are_told_with_what_they_do_to_evaluations(tmp_path):
    group = {"name": "c", "groups": ["red"]}
    also = [{"name": "size", "bounds": [0, 1], "weight": 0.5}]
    told = check_file(written(tmp_path, document(**PRIVATE, schema__group=group, schema__also=also)))
    assert "evaluations count by c: red, (other)" in told
    assert (
        "several targets, a head each: y (weight 1), size (weight 0.5); the first is what the model is judged by"
        in told
    )
    # sqrt(1 + 3) for the targets, and sqrt(2) for sums over two groups.
    assert any("have 2.8 times the noise" in line for line in told)
    assert not any("times the noise" in line for line in check_file(written(tmp_path, document(schema__group=group))))


def test_a_client_file_is_summed_up(tmp_path):
    path = written(tmp_path, CLIENT | {"tls": {"ca": "ca.pem", "certificate": "c.pem", "key": "c.key"}})
    assert check_file(path) == [
        f"{path}: a client file, valid",
        "server 127.0.0.1:8443, mutual TLS, device auto",
        "dataset t: at most epsilon 8 at delta 0.001 in all",
    ]


def test_plain_text_is_told_as_such(tmp_path):
    assert "server 127.0.0.1:8443, plain text, device auto" in check_file(written(tmp_path, CLIENT))


def test_evaluations_that_cost_more_than_the_budget_are_a_mistake_of_the_file(tmp_path):
    privacy = {"row": {"epsilon": 1.0, "delta": 1e-3, "clip": 1.0}, "evaluation": {"every": 1, "noise": 1.0}}
    path = written(tmp_path, document(privacy=privacy))
    with pytest.raises(ConfigError, match=r"it.yaml: privacy.evaluation: 3 evaluations at noise 1 cost epsilon .*more"):
        check_file(path)


@pytest.mark.parametrize("lacking", sorted(CLIENT))
def test_a_client_file_is_known_although_a_key_is_missing(tmp_path, lacking):
    path = written(tmp_path, {key: value for key, value in CLIENT.items() if key != lacking})
    with pytest.raises(ConfigError, match=f"^{path}:1: {lacking} is missing$"):
        check_file(path)


def test_every_mistake_of_a_client_file_is_told(tmp_path):
    broken = CLIENT | {"policy": {"epsilon": 0, "delta": 2}, "divice": "cpu", "server": "here"}
    with pytest.raises(ConfigError, match=r"divice is an unknown key; did you mean device\?") as caught:
        check_file(written(tmp_path, broken))
    told = [problem.split(": ", 1)[1].split()[0] for problem in caught.value.problems]
    assert sorted(told) == ["divice", "policy.delta", "policy.epsilon", "server"]


@pytest.mark.parametrize(
    "server, sentence",
    [
        ("https://localhost:8443", "without https:// before it, as in localhost:8443"),
        ("localhost:99999", "with a port from 1 to 65535"),
        ("::1:8443", "with IPv6 in brackets, as in [::1]:8443"),
        ("localhost", "and lacks the port, as in localhost:8443"),
    ],
)
def test_a_server_that_is_no_address_is_a_mistake_of_the_file(tmp_path, server, sentence):
    path = written(tmp_path, CLIENT | {"server": server})
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    assert caught.value.problems == (f"{path}:7: server must be HOST:PORT, {sentence} (got {server})",)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "expected a mapping with the keys name, schema"),
        ("- server\n- data\n", "expected a mapping with the keys name, schema"),
        ("server: [\n", "not valid YAML"),
        ("a: &x [*x]\n", "not valid YAML: nested too deeply"),
        ("? [server]\n: 1\n", "not valid YAML: a key must be text"),
        ("a: " + "[" * 1000, "not valid YAML: nested too deeply"),
    ],
)
def test_what_is_neither_is_judged_as_a_federation(tmp_path, content, expected):
    with pytest.raises(ConfigError, match=f"it.yaml:?[0-9]*: .*{expected}"):
        check_file(written(tmp_path, content))


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file$"):
        check_file(tmp_path / "nowhere.yaml")
    (tmp_path / "it.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"it.yaml: cannot be read: "):
        check_file(tmp_path / "it.yaml")


def test_a_date_that_cannot_be_is_text_and_no_crash(tmp_path):
    path = written(tmp_path, yaml.safe_dump(CLIENT) + "name: 2026-13-45\n")
    assert check_file(path)[0] == f"{path}: a client file, valid"
