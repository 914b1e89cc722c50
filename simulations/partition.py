"""How the rows of one table are dealt to clients.

Every function takes the rows' labels (or a column's values) and returns one array of row indices a client:
disjoint, together all rows, each sorted, and the same for the same generator state. No client is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Index = NDArray[np.int64]

FORMS = "iid, dirichlet:ALPHA, shards:PER_CLIENT or by:COLUMN"


def iid(rows: int, *, clients: int, rng: np.random.Generator) -> list[Index]:
    """Rows shuffled and cut into parts whose sizes differ by at most one."""
    _check(rows, clients)
    return [np.sort(part) for part in np.array_split(rng.permutation(rows), clients)]


def dirichlet(labels: Sequence[object], *, clients: int, alpha: float, rng: np.random.Generator) -> list[Index]:
    """Each label's rows are shared out by proportions drawn from Dirichlet(alpha, ..., alpha) (Hsu, Qi, Brown
    2019, arXiv:1909.06335): a large alpha approaches iid, a small one gives each client few labels.

    A client left without rows gets one from the largest.
    """
    if not 0 < alpha < float("inf"):
        raise DataError(f"dirichlet: alpha must be finite and greater than 0, got {alpha:g}")
    _check(len(labels), clients)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for rows in _by_value(labels).values():
        shuffled = rng.permutation(rows)
        cuts = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)).round().astype(int)
        for part, piece in zip(parts, np.split(shuffled, cuts), strict=True):
            part.extend(piece.tolist())
    while min(map(len, parts)) == 0:
        min(parts, key=len).append(max(parts, key=len).pop())
    return [np.sort(np.array(part, np.int64)) for part in parts]


def shards(labels: Sequence[object], *, clients: int, per_client: int, rng: np.random.Generator) -> list[Index]:
    """Rows sorted by label and cut into clients x per_client shards; each client gets `per_client` of them at
    random (McMahan et al. 2017, arXiv:1602.05629, section 3)."""
    if per_client < 1:
        raise DataError(f"shards: at least 1 a client is needed, got {per_client}")
    _check(len(labels), clients * per_client, what="shards")
    order = np.concatenate([rng.permutation(rows) for rows in _by_value(labels).values()])
    pieces = np.array_split(order, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[i] for i in mine])) for mine in dealt]


def by_value(values: Sequence[object]) -> dict[str, Index]:
    """One client for each value, by the value's name, in sorted order."""
    return {str(name): rows for name, rows in _by_value([str(value) for value in values]).items()}


def _by_value(values: Sequence[object]) -> dict[object, Index]:
    rows: dict[object, list[int]] = {}
    for i, value in enumerate(values):
        rows.setdefault(value, []).append(i)
    return {value: np.array(rows[value], np.int64) for value in sorted(rows, key=str)}


def _check(rows: int, parts: int, what: str = "clients") -> None:
    if parts < 1:
        raise DataError(f"at least 1 of {what} is needed, got {parts}")
    if rows < parts:
        raise DataError(f"{rows} rows cannot be dealt to {parts} {what}; each needs at least one")
