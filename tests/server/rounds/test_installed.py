"""A strategy that a Python package brings: named, found, checked, run, remembered, and refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.document import federation as federations
from common.document.strategy import Installed
from common.errors import ConfigError
from server.doctor import examine
from server.folder.folder import RunFolder
from server.rounds import strategies
from server.serve import new_run
from simulations.engine import simulate
from simulations.sources import sites_from_table
from tests.support import PRIVATE, WHOLE, federation

MODULE = """
import numpy as np
from flwr.serverapp.strategy import FedAvg
from common.wire.records import from_weights, to_update


class Momentum(FedAvg):
    def __init__(self, *, keep: float, **how):
        if not 0 <= keep < 1:
            raise ValueError(f"keep must be at least 0 and less than 1 (got {keep})")
        super().__init__(**how)
        self.keep, self.memory = keep, None

    def aggregate_train(self, server_round, replies):
        (first, *_) = updates = [to_update(reply.content).weights for reply in replies]
        mean = {name: np.mean([u[name] for u in updates], axis=0) for name in first}
        old = self.memory or mean
        self.memory = {name: self.keep * old[name] + (1 - self.keep) * mean[name] for name in mean}
        return from_weights(self.memory), None


class Unrelated:
    pass
"""
OWN = {"name": "installed", "entry_point": "momentum", "version": "1.0", "parameters": {"keep": 0.5}, "min_clients": 3}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it: its module, and what it says of itself."""
    folder = tmp_path / "site"
    bring(folder, "own-momentum", {"momentum": "own_momentum:Momentum", "unrelated": "own_momentum:Unrelated"})
    (folder / "own_momentum.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_momentum", raising=False)
    return folder


def bring(folder: Path, name: str, entries: dict[str, str]) -> None:
    about = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {value}\n" for entry, value in entries.items()]
    (about / "entry_points.txt").write_text("[cloister.strategies]\n" + "".join(lines))


def own(**changes: Any) -> federations.Federation:
    return federation(training__rounds=3, strategy=OWN | changes)


def run(document: federations.Federation, folder: Path) -> dict[str, Any]:
    sites = sites_from_table(document, 120, clients=3, how="iid", seed=0, device=torch.device("cpu"))
    return simulate(document, sites, RunFolder.create(document, path=folder), run="test")


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private rows"])
def test_it_is_built_with_its_parameters_and_runs_to_the_end(package, tmp_path, changes):
    document = federation(**{**changes, "training__rounds": 3, "strategy": OWN})
    strategy: Any = strategies.build(document)
    assert strategy.keep == 0.5
    result = run(document, tmp_path / "run")
    assert (result["status"], result["rounds"]) == ("completed", 3)


def test_what_it_remembers_is_in_each_checkpoint_and_given_back(package):
    strategy: Any = strategies.build(own())
    assert strategies.memory(strategy) == {}
    strategy.memory = {"w": np.array([1.5, 2.0])}
    kept = strategies.memory(strategy)
    again: Any = strategies.build(own())
    strategies.restore(again, kept)
    assert again.memory["w"].tolist() == [1.5, 2.0]
    strategies.restore(again, {})
    assert again.memory is None


def test_the_fingerprint_covers_its_name_its_version_and_its_parameters_in_any_order():
    others = [own(entry_point="other"), own(version="1.1"), own(parameters={"keep": 0.6})]
    assert len({document.fingerprint for document in [own(), *others]}) == 4
    one, other = (own(parameters=p) for p in ({"a": 1, "b": True}, {"b": True, "a": 1}))
    assert one.fingerprint == other.fingerprint
    assert federations.from_canonical(one.canonical) == one


def test_a_client_accepts_a_document_whose_strategy_it_has_not():
    assert isinstance(federations.from_canonical(own(entry_point="elsewhere").canonical).strategy, Installed)


def test_whole_clients_cannot_be_protected_with_it():
    with pytest.raises(ConfigError, match=r"privacy\.client needs a strategy of a mean"):
        federations.from_canonical(federation(**WHOLE).model_copy(update={"strategy": own().strategy}).canonical)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"entry_point": "momentun"}, r"no package .* brings momentun .*momentum.*did you mean momentum\?.*extending"),
        ({"version": "2.0"}, r"strategy\.version: the document names 2\.0 .* this Python has 1\.0"),
        (
            {"entry_point": "unrelated"},
            r"own_momentum:Unrelated must be a subclass of flwr\.serverapp\.strategy\.FedAvg",
        ),
        (
            {"parameters": {"kept": 0.5}},
            r"strategy\.parameters\.kept: is not known; momentum has keep\n.*keep: is missing",
        ),
        ({"parameters": {"keep": 0.5, "fraction_train": 0.1}}, r"parameters\.fraction_train: is not known"),
        ({"parameters": {"keep": 1.5}}, r"strategy\.parameters: momentum: keep must be at least 0 and less than 1"),
    ],
)
def test_what_cannot_be_built_is_told_with_what_can(package, changes, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        strategies.build(own(**changes))


def test_an_entry_point_that_leads_nowhere_is_told(package):
    bring(package, "broken", {"gone": "no_such_module:Gone"})
    with pytest.raises(ConfigError, match="no_such_module:Gone cannot be imported: No module named 'no_such_module'"):
        strategies.build(own(entry_point="gone"))


def test_two_packages_of_one_name_are_told_apart_by_nobody(package):
    bring(package, "rival", {"momentum": "own_momentum:Momentum"})
    with pytest.raises(ConfigError, match="several packages bring momentum: own-momentum, rival; keep one"):
        strategies.build(own())


def test_a_server_refuses_one_that_is_not_installed_before_it_writes_anything(tmp_path):
    (tmp_path / "federation.yaml").write_text(own().canonical)
    with pytest.raises(ConfigError, match=r"^strategy\.entry_point: no package"):
        new_run(tmp_path / "federation.yaml", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_doctor_says_whether_it_is_there(package, tmp_path):
    for name, state in (("momentum", "ok"), ("momentun", "wrong")):
        (tmp_path / "federation.yaml").write_text(own(entry_point=name).canonical)
        findings = examine(tmp_path / "federation.yaml", certificates=None, address="127.0.0.1:0", runs=tmp_path)
        (found,) = [finding for finding in findings if finding.what == "strategy"]
        assert (found.state, name in found.said) == (state, True)
