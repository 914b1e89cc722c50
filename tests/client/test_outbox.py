from __future__ import annotations

from pathlib import Path

import pytest

from client.outbox import Outbox
from common.errors import LedgerError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ada.outbox"


def test_a_reply_is_kept_byte_for_byte_until_it_is_dropped_also_over_a_restart(folder):
    payload = bytes(range(256)) * 300
    first = Outbox(folder, run="f/run")
    first.keep("a", b"asked", payload)
    first.keep("b", b"asked", b"")
    again = Outbox(folder, run="f/run")
    assert (again.find("a", b"asked"), again.find("b", b"asked"), again.find("c", b"asked")) == (payload, b"", None)
    again.drop("a")
    again.drop("never there")
    assert (again.find("a", b"asked"), again.find("b", b"asked")) == (None, b"")


def test_a_later_reply_to_a_task_takes_the_place_of_the_earlier(folder):
    outbox = Outbox(folder, run="f/run")
    outbox.keep("a", b"asked", b"1")
    outbox.keep("a", b"asked", b"2")
    assert outbox.find("a", b"asked") == b"2"


def test_a_reply_to_another_question_of_the_same_name_is_not_sent(folder):
    outbox = Outbox(folder, run="f/run")
    outbox.keep("t", b"asked", b"x")
    assert outbox.find("t", b"asked otherwise") is None
    assert outbox.find("t", b"asked") == b"x"


@pytest.mark.parametrize("other", ["f/other", "g/run"])
def test_another_federation_or_run_finds_no_reply_and_leaves_none(folder, other):
    Outbox(folder, run="f/run").keep("t", b"asked", b"x")
    assert Outbox(folder, run=other).find("t", b"asked") is None
    assert Outbox(folder, run="f/run").find("t", b"asked") is None


def test_a_torn_or_changed_reply_is_not_sent(folder):
    outbox = Outbox(folder, run="f/run")
    outbox.keep("t", b"asked", b"payload")
    (path,) = [p for p in folder.rglob("*") if p.is_file()]
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole[:-1] + b"!"):
        path.write_bytes(damaged)
        assert outbox.find("t", b"asked") is None
    path.write_bytes(whole)
    assert outbox.find("t", b"asked") == b"payload"


def test_others_on_the_machine_cannot_look_inside(folder):
    Outbox(folder, run="f/run")
    assert [p.stat().st_mode & 0o077 for p in folder.iterdir()] == [0]


def test_a_folder_that_cannot_be_used_is_one_clear_error(folder):
    folder.parent.mkdir()
    folder.write_text("")
    with pytest.raises(LedgerError, match="unsent replies cannot be kept: Not a directory"):
        Outbox(folder, run="f/run")


def test_a_reply_that_cannot_be_written_or_read_is_one_clear_error(folder):
    outbox = Outbox(folder, run="f/run")
    outbox.keep("t", b"asked", b"x")
    (path,) = [p for p in folder.rglob("*") if p.is_file()]
    path.unlink()
    path.mkdir()
    with pytest.raises(LedgerError, match="an unsent reply cannot be read: Is a directory"):
        outbox.find("t", b"asked")
    with pytest.raises(LedgerError, match="a reply cannot be kept, so it is not sent: Is a directory"):
        outbox.keep("t", b"asked", b"x")
