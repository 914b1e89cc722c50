from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.account import ledger as ledgers
from client.account.entries import Entry, cost_of_run, spent
from client.account.ledger import Head, Ledger
from common.errors import LedgerError
from common.privacy.releases import GaussianRelease, epsilon, epsilon_of_adaptive
from tests.support import ROOT


def entry(**changes: Any) -> Entry:
    """One Gaussian sum of all rows, noise multiplier 8."""
    one: dict[str, Any] = {
        "part": "train",
        "split": "s",
        "run": "r",
        "task": "r/train/1",
        "attempt": 1,
        "mechanism": "gaussian",
        "federation": "f",
        "content": "c",
        "noise_multiplier": 8.0,
        "sampling_rate": 1.0,
        "steps": 1,
    }
    return Entry(**{**one, **changes})


def counted(epsilon: float, **changes: Any) -> Entry:
    nothing: dict[str, Any] = {"noise_multiplier": None, "sampling_rate": None, "steps": None}
    return entry(mechanism="geometric", epsilon=epsilon, value=100, **{**nothing, **changes})


def run(script: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, with `path` and `entry` defined."""
    head = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from client.account.ledger import Ledger\nfrom tests.client.account.test_ledger import entry\n"
        "path = Path(sys.argv[1])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + script, str(path), *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "table.ledger"


# Durable


# Each of two children charges and is killed: one right after it, one in the middle of its next charge.
KILLED = """
for name in ("after.ledger", "during.ledger"):
    if not (child := os.fork()):
        ledger = Ledger(path.with_name(name))
        ledger.charge(entry(task="whole"))
        if name == "during.ledger":
            ledger._db.execute("BEGIN IMMEDIATE")
            ledger._db.execute("INSERT INTO entries (body, hash) VALUES ('half', '')")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_a_charge_outlives_a_process_that_is_killed(path):
    killing = run(KILLED, path)
    assert killing.returncode == 0, killing.stderr
    for name in ("after.ledger", "during.ledger"):
        ledger = Ledger(path.with_name(name))
        assert [e.task for e in ledger.entries()] == ["whole"]
        ledger.close()


def test_a_charge_can_be_read_by_another_connection_before_charge_returns(path):
    ledger = Ledger(path)
    ledger.charge(entry(task="seen"))
    with sqlite3.connect(path) as other:
        (body,) = other.execute("SELECT body FROM entries").fetchone()
    other.close()
    assert json.loads(body)["task"] == "seen"
    ledger.close()


def test_a_commit_waits_for_the_disk_and_for_the_folder(path):
    # EXTRA, 3: with FULL, 2, a power cut may bring the journal back and with it undo the last charge.
    ledger = Ledger(path)
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (3,)
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    ledger.close()


def test_an_entry_comes_back_as_it_was_written_with_the_time(path):
    first, second = entry(noise_multiplier=0.1 + 0.2, sampling_rate=1 / 3, steps=7), counted(0.1)
    ledger = Ledger(path)
    ledger.charge(first)
    ledger.charge(second)
    ledger.close()
    ledger = Ledger(path)
    read = ledger.entries()
    assert [Entry(**{**vars(e), "time": ""}) for e in read] == [first, second]
    assert all(e.time.endswith("+00:00") for e in read)
    assert ledger.count() == 2
    ledger.close()


def test_the_ledger_is_for_its_owner_alone(path):
    Ledger(path).close()
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_ledger_in_memory_keeps_an_account_too():
    ledger = Ledger.in_memory()
    ledger.charge(entry())
    assert len(ledger.entries()) == ledger.count() == 1
    ledger.close()


# Append-only


@pytest.mark.parametrize("change", ["DELETE FROM entries", "UPDATE entries SET body = '{}'"])
def test_entries_cannot_be_changed_or_deleted(path, change):
    ledger = Ledger(path)
    ledger.charge(entry())
    with sqlite3.connect(path) as other, pytest.raises(sqlite3.IntegrityError, match="the ledger is append-only"):
        other.execute(change)
    other.close()
    assert ledger.count() == 1
    ledger.close()


def tampered(path: Path, script: str) -> None:
    with sqlite3.connect(path) as other:
        other.executescript(f"DROP TRIGGER entries_stay; DROP TRIGGER entries_keep; {script};")
    other.close()


@pytest.mark.parametrize(
    "tamper, number",
    [
        ("UPDATE entries SET body = replace(body, '8.0', '9.0') WHERE id = 2", 2),
        ("UPDATE entries SET hash = lower(hex(zeroblob(32))) WHERE id = 2", 2),
        ("DELETE FROM entries WHERE id = 2", 2),
        ("DELETE FROM entries WHERE id = 1", 1),
        ("UPDATE entries SET id = 10 + id WHERE id = 2", 2),
        ("UPDATE entries SET id = 10 + id WHERE id = 4", 4),  # the chain itself is whole
    ],
)
def test_a_changed_removed_or_moved_entry_is_found_on_opening(path, tamper, number):
    ledger = Ledger(path)
    for i in range(4):
        ledger.charge(entry(task=f"{i}"))
    ledger.verify()
    ledger.close()
    with sqlite3.connect(path) as other:
        other.executescript(f"DROP TRIGGER entries_stay; DROP TRIGGER entries_keep; {tamper};")
    other.close()
    with pytest.raises(
        LedgerError, match=rf"entry {number} does not follow from the one before.* restore the newest copies"
    ):
        Ledger(path)


def test_a_ledger_that_was_refused_can_be_opened_once_it_is_restored(path):
    ledger = Ledger(path)
    for i in range(3):
        ledger.charge(entry(task=f"{i}"))
    ledger.close()
    good = path.read_bytes()
    tampered(path, "DELETE FROM entries WHERE id = 2")
    try:
        Ledger(path)
    except LedgerError as error:
        kept = error  # with its traceback, as a caller that logs it would
    path.write_bytes(good)
    ledger = Ledger(path)
    assert ledger.count() == 3
    assert "entry 2" in str(kept)
    ledger.close()


# The head, kept outside the file


def charged(path: Path, entries: int, *, head: Path | None = None) -> Head:
    """Charges so many more entries; returns the ledger's head."""
    ledger = Ledger(path, head=head)
    for i in range(entries):
        ledger.charge(entry(task=f"{i}"))
    found = ledger.head()
    ledger.close()
    return found


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_ledger_whose_end_was_cut_off_is_refused(path, left):
    charged(path, 4)
    tampered(path, f"DELETE FROM entries WHERE id > {left}")
    with pytest.raises(LedgerError, match=rf"has {left} entries, but has had 4, says .*head: its end was cut off"):
        Ledger(path)


def test_an_old_copy_of_the_ledger_is_refused_and_the_newest_is_accepted_again(path):
    charged(path, 2)
    old = path.read_bytes()
    charged(path, 1)
    new = path.read_bytes()
    path.write_bytes(old)
    with pytest.raises(LedgerError, match=r"or it is an old copy\. .* restore the newest copies .* taken as spent"):
        Ledger(path)
    path.write_bytes(new)
    assert charged(path, 0).entries == 3


def test_a_ledger_that_is_gone_is_not_begun_anew(path):
    charged(path, 2)
    path.unlink()
    with pytest.raises(LedgerError, match="has 0 entries, but has had 2"):
        Ledger(path)


def test_a_whole_chain_that_was_rewritten_is_refused(path, tmp_path):
    charged(path, 3)
    other = tmp_path / "other.ledger"
    ledger = Ledger(other)
    for i in range(3):
        ledger.charge(entry(task=f"{i}", noise_multiplier=80.0))  # as if it had cost less
    ledger.close()
    path.write_bytes(other.read_bytes())
    with pytest.raises(LedgerError, match=r"entry 3 is not the one that .*table\.head knows: the ledger was rewritten"):
        Ledger(path)


def test_a_lost_head_is_refused_but_a_new_ledger_needs_none(path):
    charged(path, 0)
    path.with_suffix(".head").unlink()
    assert charged(path, 1).entries == 1
    path.with_suffix(".head").unlink()
    with pytest.raises(LedgerError, match=r"table\.head: is missing, so nothing says whether the ledger's 1 entries"):
        Ledger(path)


@pytest.mark.parametrize("text", ["", "x", "3", "3:", "3:abc", "-1:" + 64 * "a", ":" + 64 * "a", "0:" + 64 * "a"])
def test_what_is_no_head_is_refused(path, text):
    charged(path, 3)
    path.with_suffix(".head").write_text(text)
    with pytest.raises(LedgerError, match="is not the head of a ledger; it looks like 33:5f3c"):
        Ledger(path)


@pytest.mark.parametrize("spoil", [lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe")])
def test_a_head_that_cannot_be_read_is_one_clear_error(path, spoil):
    charged(path, 1)
    head = path.with_suffix(".head")
    head.unlink()
    spoil(head)
    with pytest.raises(LedgerError, match=r"table\.head: the ledger's head cannot be read"):
        Ledger(path)
    reader = Ledger.reading(path)
    with pytest.raises(LedgerError, match=r"table\.head: the ledger's head cannot be read"):
        reader.verify()
    reader.close()


def test_a_process_that_died_between_a_charge_and_its_head_goes_on(path):
    first = charged(path, 2)
    charged(path, 1)
    path.with_suffix(".head").write_text(str(first))
    assert charged(path, 0).entries == 3
    assert path.with_suffix(".head").read_text().startswith("3:")


def test_a_head_on_another_disk_sees_that_the_whole_state_folder_is_an_old_copy(path, tmp_path):
    far = tmp_path / "far" / "ada.head"
    charged(path, 2, head=far)
    old = path.read_bytes()
    charged(path, 1, head=far)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match=r"has 2 entries, but has had 3, says .*far/ada\.head"):
        Ledger(path, head=far)


def test_a_head_that_was_written_down_is_checked_too(path):
    noted = charged(path, 2)
    assert Head.parse(f" {noted}\n") == noted
    charged(path, 1)
    ledger = Ledger(path)
    ledger.verify(noted)
    with pytest.raises(LedgerError, match="entry 2 is not the one that the head you gave knows"):
        ledger.verify(Head(2, 64 * "0"))
    with pytest.raises(LedgerError, match="has had 9, says the head you gave"):
        ledger.verify(Head(9, 64 * "0"))
    ledger.close()


def test_a_head_that_cannot_be_written_refuses_the_release_after_it_was_charged(path):
    ledger = Ledger(path)
    path.with_suffix(".head.new").mkdir()  # root may write anywhere, but nobody writes a folder
    with pytest.raises(LedgerError, match="head cannot be written, so nothing is released: Is a directory"):
        ledger.charge(entry())
    assert ledger.count() == 1  # over-counted, never under-counted
    path.with_suffix(".head.new").rmdir()
    ledger.charge(entry())
    assert path.with_suffix(".head").read_text().startswith("2:")
    ledger.close()


def test_a_ledger_can_be_read_while_it_is_in_use_and_reading_makes_no_file(path):
    ledger = Ledger(path)
    ledger.charge(entry())
    other = Ledger.reading(path)
    assert other.count() == 1
    ledger.charge(entry())
    other.verify()
    assert other.count() == 2
    other.close()
    ledger.close()
    with pytest.raises(LedgerError, match=r"nothing\.ledger: cannot be read as a ledger"):
        Ledger.reading(path.with_name("nothing.ledger"))
    assert not path.with_name("nothing.ledger").exists()


def test_a_charge_that_another_process_has_overtaken_is_not_written(path):
    ledger = Ledger(path)
    ledger.charge(entry(), after=0)
    with pytest.raises(LedgerError, match=r"another process writes to it; stop one of them\. Nothing is released"):
        ledger.charge(entry(), after=0)
    assert ledger.count() == 1
    ledger.close()


def test_a_ledger_has_one_lock_and_one_head_by_whatever_name(path, tmp_path):
    ledger = Ledger(path)
    ledger.charge(entry())
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "linked.ledger"
    link.symlink_to(path)
    with pytest.raises(LedgerError, match="in use by another client"):
        Ledger(link)
    ledger.close()


def test_a_linked_head_stays_where_its_owner_put_it(path, tmp_path):
    far = tmp_path / "far.head"
    far.write_text("0:")
    path.parent.mkdir()
    path.with_suffix(".head").symlink_to(far)
    charged(path, 1, head=path.with_suffix(".head"))
    charged(path, 1)
    assert far.read_text().startswith("2:")
    assert path.with_suffix(".head").is_symlink()


def test_verifying_beside_a_client_that_charges_meanwhile_finds_no_fault(path, monkeypatch):
    ledger = Ledger(path)
    ledger.charge(entry())
    reader = Ledger.reading(path)
    read = reader._read

    def meanwhile(query: str, *values: str) -> Any:
        found = read(query, *values)
        ledger.charge(entry())
        return found

    monkeypatch.setattr(reader, "_read", meanwhile)
    reader.verify()
    reader.close()
    ledger.close()


def test_a_ledger_that_cannot_be_read_is_one_clear_error(path):
    ledger = Ledger(path)
    ledger.close()
    for ask in (ledger.entries, ledger.count, ledger.head, lambda: ledger.plan("r")):
        with pytest.raises(LedgerError, match="the ledger cannot be read"):
            ask()


def test_a_clock_that_is_set_back_does_not_set_back_the_entries(path, monkeypatch):
    class Clock(datetime):
        hour_now = 12

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 5, 1, cls.hour_now, tzinfo=UTC)

    monkeypatch.setattr(ledgers, "datetime", Clock)
    ledger = Ledger(path)
    for hour in (12, 3, 15):
        Clock.hour_now = hour
        ledger.charge(entry())
    assert [e.time[11:13] for e in ledger.entries()] == ["12", "12", "15"]
    assert spent(ledger.entries(), DELTA) == spent([entry()] * 3, DELTA)
    ledger.close()


def test_closing_waits_for_a_charge_that_another_thread_is_writing(path):
    ledger, begun = Ledger(path), threading.Event()

    def slowly() -> None:
        with ledger._transaction():
            begun.set()
            time.sleep(0.3)
            ledger._db.execute("INSERT INTO plans VALUES ('t', '{}')")

    with ThreadPoolExecutor(1) as other:
        written = other.submit(slowly)
        begun.wait()
        ledger.close()
        assert written.exception() is None


# One process at a time


def test_a_second_process_is_refused_while_the_first_holds_the_ledger(path):
    ledger = Ledger(path)
    refused = run("Ledger(path)", path)
    assert "LedgerError" in refused.stderr
    assert (
        "table.ledger: in use by another client; one process at a time may spend a budget. Stop the" in refused.stderr
    )
    ledger.close()
    Ledger(path).close()


def test_the_same_process_cannot_open_it_twice_either(path):
    ledger = Ledger(path)
    with pytest.raises(LedgerError, match="in use by another client"):
        Ledger(path)
    ledger.charge(entry())
    ledger.close()


# What goes wrong


def full(ledger: Ledger) -> None:
    """Lets the file grow no further, as a full disk does."""
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_refuses_the_charge_says_so_and_writes_nothing(path):
    ledger = Ledger(path)
    ledger.charge(entry(task="before"))
    full(ledger)
    with pytest.raises(LedgerError, match=r"cannot be written, so nothing is released: database or disk is full"):
        ledger.charge(entry(task="x" * 100_000))
    assert [e.task for e in ledger.entries()] == ["before"]
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    ledger.charge(entry(task="after"))
    ledger.close()
    ledger = Ledger(path)
    assert [e.task for e in ledger.entries()] == ["before", "after"]
    ledger.close()


def test_a_file_that_cannot_be_written_refuses_the_charge(path):
    ledger = Ledger(path)
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="cannot be written, so nothing is released: attempt to write a readonly"):
        ledger.charge(entry())
    assert ledger.count() == 0
    ledger.close()


def test_what_is_no_ledger_is_refused(path):
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be asked" * 50)
    with pytest.raises(LedgerError, match=r"table\.ledger: cannot be opened: file is not a database"):
        Ledger(path)


def test_a_state_folder_that_is_a_file_is_refused(path):
    path.parent.write_text("")
    with pytest.raises(LedgerError, match=r"table\.ledger: cannot be opened: .*exists"):
        Ledger(path)


# Plans


def test_a_plan_is_kept_exactly_and_for_its_run_alone(path):
    ledger = Ledger(path)
    ledger.store_plan("r", {"noise_multiplier": 0.1 + 0.2, "rounds": 3})
    ledger.close()
    ledger = Ledger(path)
    assert ledger.plan("r") == {"noise_multiplier": 0.1 + 0.2, "rounds": 3}
    assert ledger.plan("other") is None
    with pytest.raises(LedgerError, match=r"UNIQUE constraint failed: plans\.run"):
        ledger.store_plan("r", {"noise_multiplier": 0.0})
    ledger.close()


# What was spent


def test_a_charge_and_a_look_may_come_from_two_threads_at_once(tmp_path):
    # The link asks for the last round's time on its own thread while a task is being charged on another.
    ledger = Ledger(tmp_path / "a.ledger")
    with ThreadPoolExecutor(2) as threads:
        charges = [threads.submit(ledger.charge, entry(task=f"t/{n}")) for n in range(100)]
        others = [threads.submit(ledger.last_round) for _ in range(100)]
        for future in [*charges, *others]:
            future.result()
    ledger.verify()
    assert ledger.count() == 100
    ledger.close()


DELTA = 1e-3


def cost(sigma: float, times: int = 1) -> float:
    """Of `times` sums with noise multiplier `sigma`, which are like one with sigma / sqrt(times), at half of delta."""
    return epsilon([GaussianRelease(noise_multiplier=sigma / math.sqrt(times))], DELTA / 2)


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([], 0.0),
        ([entry()], cost(8)),
        ([entry(), entry(task="x", federation="g", content="d")], cost(8, 2)),
        # A row is in one part, and pays the larger cost.
        ([entry(), entry(part="validation", noise_multiplier=4.0)], cost(4)),
        ([entry(noise_multiplier=4.0), entry(part="validation")], cost(4)),
        ([entry(), entry(), entry(part="validation", noise_multiplier=8.0)], cost(8, 2)),
        # Dealt in two ways, it may have been in both.
        ([entry(), entry(part="validation", split="t")], cost(8, 2)),
        ([entry(), entry(split="t")], cost(8, 2)),
        # A pure epsilon adds, in its own part.
        ([counted(0.25)], 0.25),
        ([counted(0.25), counted(0.5)], 0.75),
        ([counted(0.25), entry()], 0.25 + cost(8)),
        ([counted(0.25), entry(part="validation", noise_multiplier=4.0)], cost(4)),
        ([counted(5.0), entry(part="validation", noise_multiplier=4.0)], 5.0),
        ([counted(0.25), entry(part="validation", split="t")], 0.25 + cost(8)),
    ],
)
def test_what_was_spent(entries, expected):
    assert spent(entries, DELTA) == pytest.approx(expected, abs=1e-3)


def test_runs_chosen_one_after_the_other_compose_by_the_bound_that_holds_for_that():
    # RDP of a Gaussian mechanism is alpha / (2 sigma^2) at order alpha (Mironov 2017, corollary 3), and it adds up; the
    # conversion to epsilon is Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), proposition 12; six orders share
    # half of delta: the other half is for the outputs on which there was no second run, whose bound is another.
    def bound(order: int) -> float:
        rdp = 2 * order / (2 * 8.0**2)
        return rdp + math.log1p(-1 / order) - math.log(DELTA / 2 / 6 * order) / (order - 1)

    runs = [entry(), entry(run="another")]
    assert spent(runs, DELTA) == pytest.approx(min(map(bound, (2, 3, 4, 6, 10, 20))), rel=1e-6)
    assert spent(runs, DELTA) > 1.05 * spent([entry(), entry()], DELTA)


def test_two_bounds_that_hold_on_complementary_events_share_delta():
    # Whether there is a second run may depend on the first's outputs: neither bound may then use all of delta.
    one, two = [entry()], [entry(), entry(run="another")]
    by_pld, by_filter = epsilon([entry().gaussian], DELTA), epsilon_of_adaptive([entry().gaussian] * 2, DELTA)
    assert spent(one, DELTA) > 1.05 * by_pld
    assert spent(two, DELTA) > 1.05 * by_filter
    assert spent(one, 2 * DELTA) == pytest.approx(by_pld)  # at 2 delta each has delta, as both once had
    assert spent(two, 2 * DELTA) == pytest.approx(by_filter)
    assert cost_of_run(one, DELTA) == by_pld  # a run that was fixed beforehand, by itself
    with pytest.raises(AssertionError):
        cost_of_run(two, DELTA)


def test_a_row_count_that_another_run_told_in_the_light_of_the_first_is_a_second_run():
    # Else a run could be stopped when its results suit, and counts be bought for what it had planned.
    update, count = entry(), counted(0.1, run="another")
    assert spent([count, update], DELTA) == pytest.approx(0.1 + cost(8.0))  # told before: pure, and planned with
    assert spent([update, count], DELTA) == pytest.approx(0.1 + epsilon_of_adaptive([update.gaussian], DELTA / 2))
    assert spent([update, count], DELTA) > 1.05 * spent([count, update], DELTA)
    assert spent([update, counted(0.1)], DELTA) == spent([counted(0.1), update], DELTA)  # its own
    evaluation = replace(update, part="validation")
    assert spent([evaluation, count], DELTA) == pytest.approx(cost(8.0))  # of other rows


def test_what_is_planned_counts_as_if_it_were_spent():
    assert spent([entry()], DELTA, more=[entry()]) == spent([entry(), entry()], DELTA)
    assert spent([entry()], DELTA, more=[entry(part="validation", split="t")]) > 1.2 * spent([entry()], DELTA)
