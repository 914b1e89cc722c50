from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister.privacy import lines, read
from common.errors import RunFolderError
from common.privacy import second_opinion
from common.privacy.statement import Statement
from server.folder.folder import RunFolder
from simulations.engine import simulate
from simulations.sources import sites_from_table
from tests.support import PRIVATE, WHOLE, federation, stated, table


def statement(folder: Path, **changes: Any) -> dict[str, Any]:
    """What a simulated run leaves."""
    document = federation(**changes)
    table(200).write_csv(folder / "table.csv")
    sites = sites_from_table(document, folder / "table.csv", clients=2, how="iid", seed=0, device=torch.device("cpu"))
    run = RunFolder.create(document, path=folder / "run")
    simulate(document, sites, run, run="test")
    return read(run.path)


def shown(folder: Path, **changes: Any) -> list[str]:
    statement(folder, **changes)
    return lines(folder / "run")


def test_a_reader_finds_every_part_of_the_promise(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    text = "\n".join(lines(tmp_path / "run"))
    for name, one in told["row"]["per_client"].items():
        assert f"{name}: epsilon {one['epsilon']:.2f} at delta 0.001" in text
    for wanted in (
        "Unit: one row of one client's table.",
        "Neighbours: tables that differ by adding or removing that row.",
        "Adversary: sees every message",
        "Accountant: PLD",
        "Poisson sampling at rate",
        "Not covered:",
        "The whole model:",
        "Each client as a whole: not protected.",
        "opacus",
        "a seeded stream: for simulations only",  # what the noise of a simulation is worth
    ):
        assert wanted in text.replace("\n    ", " ").replace("\n      ", " ")
    assert max(map(len, text.splitlines())) <= 100


def test_opacus_figures_stand_beside_ours(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    text = "\n".join(lines(tmp_path / "run"))
    for one in told["row"]["per_client"].values():
        assert one["opacus_accountant"] == "PRV"
        assert one["opacus_planned_epsilon"] == pytest.approx(one["planned_epsilon"], rel=1e-3)
        assert f"Opacus (PRV), told by the client: {one['opacus_planned_epsilon']:.2f} for the whole plan" in text
    recomputed = [float(x.split()[0]) for x in text.split("Opacus (PRV), recomputed here: at most ")[1:]]
    stated = [one["epsilon"] for _, one in sorted(told["row"]["per_client"].items())]
    assert len(recomputed) == len(stated) == 2
    for theirs, ours in zip(recomputed, stated, strict=True):
        assert ours - 0.005 <= theirs <= 1.021 * ours + 0.02  # their upper bound, with twice an error of 1 %


def test_the_arithmetic_of_each_client_is_said(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    first, _ = told["row"]["per_client"].values()
    first["arithmetic"] = Statement.from_wire(stated(exact_arithmetic=0)).describe(clip=1.0)["arithmetic"]
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(told))
    text = " ".join("\n".join(lines(tmp_path / "run")).split())
    assert text.count("arithmetic: exact: sums and their noise are whole numbers") == 1
    assert text.count("arithmetic: floating point (Opacus): the figures hold for real numbers") == 1


def test_a_weaker_noise_than_was_stated_shows_in_opacus_figure(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    (name, one), *_ = told["row"]["per_client"].items()
    for release in one["released"]:
        if release["what"].startswith("model updates"):
            release["noise_multiplier"] *= 0.8
    told["row"]["per_client"] = {name: one}
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(told))
    text = "\n".join(lines(tmp_path / "run"))
    assert float(text.split("recomputed here: at most ")[1].split()[0]) > 1.1 * one["epsilon"]


def test_where_prv_cannot_say_opacus_rdp_is_named(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    for one in told["row"]["per_client"].values():
        one["delta"] = 1e-11
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(told))
    assert any("Opacus (RDP), recomputed here: at most" in line for line in lines(tmp_path / "run"))


def test_a_statement_of_before_opacus_figure_was_told_is_still_shown(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    for one in told["row"]["per_client"].values():
        del one["opacus_planned_epsilon"], one["opacus_accountant"]
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(told))
    text = "\n".join(lines(tmp_path / "run"))
    assert "told by the client" not in text
    assert text.count("Opacus (PRV), recomputed here") == 2


def test_without_opacus_the_statement_is_shown_and_says_so(tmp_path, monkeypatch):
    statement(tmp_path, **PRIVATE)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    second_opinion._opinion.cache_clear()
    text = "\n".join(lines(tmp_path / "run"))
    assert text.count("Opacus is not installed here, so nothing was recomputed") == 2


def test_an_older_clients_statement_has_no_opacus_figure():
    said = Statement.from_wire(stated()).describe(clip=1.0)
    assert (said["opacus_planned_epsilon"], said["opacus_accountant"]) == (None, None)
    fallen = Statement.from_wire(stated(opacus_planned_epsilon=5.0, opacus_prv=0)).describe(clip=1.0)
    assert (fallen["opacus_planned_epsilon"], fallen["opacus_accountant"]) == (5.0, "RDP")


def test_both_units_stand_side_by_side(tmp_path):
    changes = {**WHOLE, "privacy__row": {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0}, "strategy__fraction": 0.5}
    text = "\n".join(shown(tmp_path, **changes))
    assert text.index("Each row: epsilon") < text.index("Each client as a whole: epsilon")


def test_only_whole_clients_is_said_to_leave_rows_to_the_servers_care(tmp_path):
    text = "\n".join(shown(tmp_path, **WHOLE))
    assert "Each row: no protection of its own; clients send exact updates to the server." in text
    assert "Each client as a whole: epsilon" in text


def test_no_privacy_is_called_none(tmp_path):
    assert shown(tmp_path)[-1] == ("No differential privacy: the updates that left are exact, and can reveal rows.")


def test_a_run_that_released_nothing_says_so(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    told["row"] |= {"epsilon": None, "per_client": {}}
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(told))
    assert any("epsilon 0 (nothing was released)" in line for line in lines(tmp_path / "run"))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"row": null}'])
def test_what_is_no_run_folder_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "privacy.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"privacy\.json: (cannot be read|not a privacy statement)"):
        lines(tmp_path)


@pytest.mark.parametrize(
    "damage", [{"row": {}}, {"row": 3}, {"client": {"epsilon": 1}}, {"software": []}, {"row": {"epsilon": "x"}}]
)
def test_a_statement_that_is_damaged_inside_is_refused(tmp_path, damage):
    told = statement(tmp_path, **PRIVATE) | damage
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(told))
    with pytest.raises(RunFolderError, match=r"privacy\.json: not a privacy statement, or damaged"):
        lines(tmp_path / "run")


def test_the_statement_names_the_clients_own_noise_and_the_software(tmp_path):
    told = statement(tmp_path, **PRIVATE)
    assert {"python", "cloister", "opacus", "torch", "flwr", "numpy"} <= set(told["software"])
    assert json.dumps(told)
