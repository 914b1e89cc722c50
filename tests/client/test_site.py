from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.site import split_key
from common.errors import DataError


def test_a_split_key_is_made_once_and_readable_by_its_owner_alone(tmp_path):
    key = split_key(tmp_path / "state")
    assert len(key) == 32
    assert split_key(tmp_path / "state") == key
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["split.key"]
    assert (tmp_path / "state" / "split.key").stat().st_mode & 0o077 == 0
    assert split_key(tmp_path / "other") != key


def test_two_clients_that_first_start_in_one_folder_at_once_share_a_key(tmp_path, monkeypatch):
    link = os.link

    def late(fresh: Path, path: Path) -> None:
        path.write_bytes(b"k" * 32)  # the other one was first
        link(fresh, path)

    monkeypatch.setattr(os, "link", late)
    assert split_key(tmp_path) == b"k" * 32
    assert [p.name for p in tmp_path.iterdir()] == ["split.key"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_damaged_key_is_refused_and_not_replaced(tmp_path, size):
    (tmp_path / "split.key").write_bytes(b"k" * size)
    with pytest.raises(DataError, match="not a split key of 32 bytes; restore it"):
        split_key(tmp_path)
    assert (tmp_path / "split.key").stat().st_size == size
