from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import RunFolderError
from server.explain import lines, read
from server.rundir import RunFolder
from simulations.engine import simulate, sites_from_table
from tests.support import PRIVATE, WHOLE, federation, table


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
