"""A model's file with the program beside it that uses it: what the verbs share that write one."""

from __future__ import annotations

from pathlib import Path

from common.text import in_bytes

TOLERANCE = 1e-5  # by which a file may differ from `cloister predict`


def write(path: Path, data: bytes, example: Path, template: str) -> None:
    """Writes a model, and the program beside it. Raises `OutputError`."""
    from importlib.resources import files as resources

    from common import files

    files.write_out(path, data)
    files.write_out(example, resources("common.inference").joinpath(template).read_bytes())


def size(path: Path) -> str:
    """A file's size, for people."""
    return in_bytes(path.stat().st_size)
