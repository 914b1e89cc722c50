"""How the rows of one table are dealt to clients.

Every function takes the rows' labels (or a column's values) and returns one array of row indices a client:
disjoint and together all rows (but for `draw`), each sorted, and the same for the same generator state. No client is
empty.

They are a few lines of numpy each on rows that are here already. The partitioners of flwr-datasets do the same on a
Hugging Face dataset, for which it would bring pyarrow, pandas and a hundred MB.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Index = NDArray[np.int64]

FORMS = "iid, dirichlet:ALPHA, shards:PER_CLIENT, quantity:EXPONENT, shift:COLUMN, draw:ROWS or by:COLUMN"


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
    largest = [(-len(part), i) for i, part in enumerate(parts)]
    heapq.heapify(largest)
    for part in parts:
        if not part:
            size, i = largest[0]
            part.append(parts[i].pop())
            heapq.heapreplace(largest, (size + 1, i))
    return [np.sort(np.array(part, np.int64)) for part in parts]


def quantity(rows: int, *, clients: int, exponent: float, rng: np.random.Generator) -> list[Index]:
    """Rows shuffled and cut into parts whose sizes follow a power law: the k-th largest is in proportion to
    k^-exponent, but none is empty. 0 gives equal parts. Which client has which size is drawn."""
    if not 0 <= exponent < float("inf"):
        raise DataError(f"quantity: the exponent must be finite and not negative, got {exponent:g}")
    _check(rows, clients)
    share = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
    ends = np.cumsum(share / share.sum()) * (rows - clients) + np.arange(1, clients + 1)
    cuts = np.floor(ends[:-1] + 0.5).astype(np.int64)
    parts = np.split(rng.permutation(rows), cuts)
    return [np.sort(parts[i]) for i in rng.permutation(clients)]


def shift(values: NDArray[np.float64], *, clients: int, rng: np.random.Generator) -> list[Index]:
    """Rows sorted by a column's values and cut into parts whose sizes differ by at most one: each client sees its own
    range of that feature (covariate shift; Kairouz et al. 2021, arXiv:1912.04977, section 3.1). Rows without a value
    come last, and equal ones in a random order."""
    _check(len(values), clients)
    if np.isnan(values).all():
        raise DataError("shift: the column has no numbers")
    order = np.lexsort((rng.permutation(len(values)), values))
    return [np.sort(part) for part in np.array_split(order, clients)]


def draw(rows: int, *, clients: int, each: int, rng: np.random.Generator) -> list[Index]:
    """Each client draws `each` different rows. Clients may have rows in common, so there may be many more of them than
    the table has rows for: what is simulated is how much they compute and not how much there is to learn."""
    _check(rows, 1)
    if not 1 <= each <= rows:
        raise DataError(f"draw: a client can have from 1 to {rows} rows of this table, got {each}")
    return [np.sort(rng.choice(rows, each, replace=False, shuffle=False)) for _ in range(clients)]


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
