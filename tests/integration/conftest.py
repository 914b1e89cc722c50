"""Federations of real processes, ended with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.federation import Federation


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    with ExitStack() as processes:
        yield lambda **changes: Federation(tmp_path, processes, **changes)
