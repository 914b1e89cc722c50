from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import files
from common.errors import OutputError


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
