from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from common import files
from common.errors import OutputError
from tests.support import ROOT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


def names(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()]


def test_a_file_is_replaced_at_once(path):
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), names(path)) == (b"new", ["file"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_there_and_nothing_else(path, error):
    with pytest.raises(type(error)), files.replacing(path) as file:
        file.write(b"half")
        raise error
    assert (path.read_bytes(), names(path)) == (b"old", ["file"])


def test_what_an_interrupted_writer_left_is_written_over(path):
    path.with_name("file.new").write_bytes(b"a longer one that was left")
    files.replace(path, b"new")
    assert (path.read_bytes(), names(path)) == (b"new", ["file"])


def test_of_two_exclusive_writers_the_second_is_told_and_disturbs_nothing(path):
    with files.replacing(path, exclusive=True) as file:
        file.write(b"new")
        with pytest.raises(FileExistsError), files.replacing(path, exclusive=True) as second:
            second.write(b"other")
    assert (path.read_bytes(), names(path)) == (b"new", ["file"])


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_durable_is_synced_before_it_takes_the_place_and_its_folder_after(path, durable, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def synced(opened: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{opened}"))
        fsync(opened)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    files.replace(path, b"new", durable=durable)
    assert done == ([f"{path}.new", "rename", str(path.parent)] if durable else ["rename"])


def test_a_mode_can_be_asked_for(path):
    with files.replacing(path, mode=0o600) as file:
        file.write(b"new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_somebody_asked_for_is_written_whole_or_said(tmp_path):
    files.write_out(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    with pytest.raises(OutputError, match="none/out: cannot be written: No such file or directory"):
        files.write_out(tmp_path / "none" / "out", b"new")


def test_a_file_that_is_being_read_is_replaced_once_its_reader_is_done(path, monkeypatch):
    """Windows lets nobody replace an open file; this system does, so the refusal is acted here."""
    refusals, rename = [PermissionError(13, "Access is denied")] * 3, Path.replace

    def renamed(self: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(files, "POSIX", False)
    files.replace(path, b"new")
    assert (path.read_bytes(), names(path)) == (b"new", ["file"])


def test_a_file_that_stays_open_elsewhere_is_an_error_and_stays_as_it_was(path, monkeypatch):
    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(Path, "replace", refused)
    monkeypatch.setattr(files, "POSIX", False)
    monkeypatch.setattr(files, "READ_ELSEWHERE_S", 0.05)
    with pytest.raises(PermissionError):
        files.replace(path, b"new")
    assert (path.read_bytes(), names(path)) == (b"old", ["file"])


def test_a_lock_is_given_back_also_by_another_thread_and_may_be_taken_again(tmp_path):
    lock = tmp_path / "a.lock"
    with ExitStack() as held:
        held.enter_context(files.locked(lock))
        with pytest.raises(BlockingIOError, match=r"a\.lock"), files.locked(lock):
            pass
        with ThreadPoolExecutor(1) as other:
            other.submit(held.pop_all().close).result()
    with files.locked(lock):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    lock = tmp_path / "a.lock"
    code = f"import pathlib, time; from common import files\nwith files.locked(pathlib.Path({str(lock)!r})):\n"
    holder = subprocess.Popen([sys.executable, "-c", f"{code} print(flush=True); time.sleep(60)"], stdout=-1, cwd=ROOT)
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        with pytest.raises(BlockingIOError), files.locked(lock):
            pass
        holder.kill()
    with files.locked(lock):
        pass
