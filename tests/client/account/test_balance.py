from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.account.balance import read_balance
from client.account.entries import spent
from client.account.ledger import Ledger
from cloister.budget import lines
from common.errors import LedgerError
from common.privacy.releases import epsilon
from tests.client.account.test_budget import opened
from tests.client.account.test_ledger import counted, entry


@pytest.fixture
def client_file(tmp_path: Path) -> Path:
    value = {
        "server": "localhost:1",
        "tls": None,
        "name": "ada",
        "data": {"path": "gone.csv", "name": "hearts"},  # looking at an account needs no table
        "state": "state",
        "policy": {"epsilon": 8.0, "delta": 1e-3},
    }
    path = tmp_path / "client.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def charge(client_file: Path, *entries: Any) -> str:
    ledger = Ledger(client_file.parent / "state" / "hearts.ledger")
    for one in entries:
        ledger.charge(one)
    head = str(ledger.head())
    ledger.close()
    return head


UPDATE = {"noise_multiplier": 2.0, "sampling_rate": 0.1, "steps": 5}


def test_an_account_that_never_spent_says_so_and_no_file_is_made(client_file):
    account = read_balance(client_file, verify=True).describe()
    assert (account["spent"], account["left"], account["runs"]) == (0.0, 8.0, [])
    assert lines(account)[-1] == "nothing was ever released"
    assert not (client_file.parent / "state").exists()


def test_one_run_is_shown_with_how_each_kind_of_release_was_made_private(client_file):
    updates, counts = [entry(task=f"{i}", **UPDATE) for i in range(4)], entry(part="validation", noise_multiplier=3.0)
    charge(client_file, counted(0.1), *updates, counts)
    account = read_balance(client_file).describe()
    (run,) = account["runs"]
    by_kind = {r["what"]: r for r in run["released"]}
    assert {kind: r["times"] for kind, r in by_kind.items()} == {"row count": 1, "model update": 4, "evaluation": 1}
    assert by_kind["row count"]["epsilon"] == 0.1
    assert [r for r in run["released"] if "epsilon" in r] == [by_kind["row count"]]  # the others' would be no bounds
    costs = [0.1 + epsilon([e.gaussian for e in updates], 1e-3), epsilon([counts.gaussian], 1e-3)]
    assert run["epsilon"] == pytest.approx(max(costs))
    assert account["spent"] == pytest.approx(epsilon([counts.gaussian], 1e-3 / 2))
    assert account["left"] == pytest.approx(8.0 - account["spent"])
    shown = "\n".join(lines(account))
    assert f"spent   {account['spent']:.2f}   left {account['left']:.2f}" in shown
    assert "4 x model update  of train rows, noise multiplier 2, 5 steps at sampling rate 0.1" in shown
    assert f"at most epsilon {run['epsilon']:.2f}, all that was planned included" in shown
    assert "(counted at half of delta, because more runs may follow)" in shown  # why spent is above that


def test_a_run_is_shown_with_what_its_whole_plan_may_cost(client_file):
    # Whoever sees its results may have chosen when to stop: what was charged so far would be no bound.
    ledger = Ledger(client_file.parent / "state" / "hearts.ledger")
    budget = opened(ledger)
    budget.charge_update("run/train/1")
    ledger.close()
    (run,) = read_balance(client_file).describe()["runs"]
    assert {r["what"]: r["times"] for r in run["released"]} == {"row count": 1, "model update": 1}
    assert run["epsilon"] == pytest.approx(budget.plan.total)
    assert run["epsilon"] > 1.2 * budget.epsilon


def test_a_run_that_used_an_earlier_runs_row_count_is_shown_with_what_that_cost(client_file):
    ledger = Ledger(client_file.parent / "state" / "hearts.ledger")
    plans = []
    for run in ("one", "two"):
        budget = opened(ledger, run=run)
        budget.charge_update(f"{run}/train/1")
        plans.append(budget.plan)
    ledger.close()
    account = read_balance(client_file).describe()
    assert [r["what"] for run in account["runs"] for r in run["released"]].count("row count") == 1
    assert [run["epsilon"] for run in account["runs"]] == pytest.approx([plan.total for plan in plans])


def test_a_runs_name_cannot_rewrite_the_report(client_file):
    evil = "x\x1b[2J\x1b[Hspent   0.00   left 8.00\nnothing was ever released\x1b[8m"
    charge(client_file, entry(run=evil, **UPDATE))
    shown = lines(read_balance(client_file).describe())
    assert all(line.isprintable() for line in shown)
    assert "nothing was ever released" not in shown
    (run,) = (line for line in shown if line.startswith("run x"))
    assert "nothing was ever released" in run  # on the run's own line


def test_refusals_that_were_heard_are_counted_and_cost_no_epsilon(client_file):
    refusal = {"mechanism": "refusal", "split": "", "content": "", "run": "", "noise_multiplier": None}
    charge(client_file, *(replace(entry(task=f"{i}", **UPDATE), **refusal) for i in range(2)))
    account = read_balance(client_file).describe()
    assert (account["refusals"], account["spent"], account["runs"]) == (2, 0.0, [])
    assert "documents that did not fit the table, and were told so: 2" in lines(account)
    charge(client_file, entry(**UPDATE), entry(part="validation", noise_multiplier=3.0))
    both = read_balance(client_file).describe()
    costs = [epsilon([e.gaussian], 1e-3 / 2) for e in (entry(**UPDATE), entry(part="validation", noise_multiplier=3.0))]
    assert both["spent"] == pytest.approx(max(costs))  # a refusal's empty split does not make it two


def test_several_runs_cost_what_holds_for_adaptive_choices_and_the_reader_is_told(client_file):
    entries = [entry(task=f"{r}/{i}", run=f"run-{r}", **UPDATE) for r in range(2) for i in range(4)]
    charge(client_file, *entries)
    account = read_balance(client_file).describe()
    assert [r["run"] for r in account["runs"]] == ["run-0", "run-1"]
    assert account["spent"] == pytest.approx(spent(entries, 1e-3))
    together = [epsilon([e.gaussian for e in entries], 1e-3, accountant=by) for by in ("pld", "rdp")]
    assert account["spent"] > max(together)
    assert "by" not in account  # figures that bound nothing once there are several runs
    assert any("chosen in the light of earlier ones" in line for line in lines(account))


def test_more_than_the_policy_leaves_nothing_and_not_less_than_nothing(client_file):
    charge(client_file, *(entry(task=f"{i}", noise_multiplier=0.5) for i in range(9)))
    account = read_balance(client_file).describe()
    assert account["spent"] > 8.0
    assert account["left"] == 0.0


def test_exact_releases_are_shown_and_have_no_epsilon(client_file):
    exact = {"mechanism": "none", "noise_multiplier": None, "sampling_rate": None, "steps": None}
    charge(client_file, entry(**exact), entry(part="validation", **exact))
    account = read_balance(client_file).describe()
    assert (account["spent"], account["exact"]) == (0.0, 2)
    assert [run["epsilon"] for run in account["runs"]] == [None]
    shown = "\n".join(lines(account))
    assert "and 2 exact releases without privacy, which no epsilon bounds" in shown
    assert "1 x exact update  of train rows, without privacy" in shown
    assert shown.count("no privacy") == 1


def test_verify_finds_an_old_copy_and_looking_does_not_mind(client_file):
    charge(client_file, entry(task="1"))
    path = client_file.parent / "state" / "hearts.ledger"
    old = path.read_bytes()
    charge(client_file, entry(task="2"))
    path.write_bytes(old)
    assert read_balance(client_file).describe()["entries"] == 1
    with pytest.raises(LedgerError, match="has 1 entries, but has had 2"):
        read_balance(client_file, verify=True)


def test_a_head_that_was_written_down_must_be_in_the_ledger(client_file):
    noted = charge(client_file, entry(task="1"))
    charge(client_file, entry(task="2"))
    assert read_balance(client_file, head=noted).describe()["entries"] == 2
    with pytest.raises(LedgerError, match="has had 5, says the head you gave"):
        read_balance(client_file, head="5:" + 64 * "a")
    for name in ("hearts.ledger", "hearts.head"):
        (client_file.parent / "state" / name).unlink()
    with pytest.raises(LedgerError, match=r"hearts\.ledger: is missing, but has had 1 entries, says the head given"):
        read_balance(client_file, head=noted)


def test_a_ledger_that_is_gone_though_its_head_is_there_is_no_empty_account(client_file):
    charge(client_file, entry())
    (client_file.parent / "state" / "hearts.ledger").unlink()
    with pytest.raises(LedgerError, match=r"hearts\.ledger: cannot be read as a ledger"):
        read_balance(client_file)


def test_the_head_may_lie_elsewhere(client_file, tmp_path):
    value = yaml.safe_load(client_file.read_text()) | {"head": "far/hearts.head"}
    client_file.write_text(yaml.safe_dump(value))
    ledger = Ledger(tmp_path / "state" / "hearts.ledger", head=tmp_path / "far" / "hearts.head")
    ledger.charge(entry())
    ledger.close()
    assert read_balance(client_file, verify=True).describe()["verified"] is True
    (tmp_path / "far" / "hearts.head").unlink()
    with pytest.raises(LedgerError, match=r"far/hearts\.head: is missing"):
        read_balance(client_file, verify=True)


def test_the_account_is_plain_json(client_file):
    charge(client_file, counted(0.1), entry(**UPDATE))
    account = read_balance(client_file).describe()
    assert json.loads(json.dumps(account)) == account
