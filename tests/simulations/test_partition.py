from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from simulations.partition import Index, by_value, dirichlet, draw, iid, quantity, shards, shift

Deal = Callable[[Sequence[object], int, np.random.Generator], list[Index]]

DEALS: dict[str, Deal] = {
    "iid": lambda labels, clients, rng: iid(len(labels), clients=clients, rng=rng),
    "dirichlet": lambda labels, clients, rng: dirichlet(labels, clients=clients, alpha=0.3, rng=rng),
    "steep": lambda labels, clients, rng: dirichlet(labels, clients=clients, alpha=1e-3, rng=rng),
    "shards": lambda labels, clients, rng: shards(labels, clients=clients, per_client=2, rng=rng),
    "quantity": lambda labels, clients, rng: quantity(len(labels), clients=clients, exponent=1.5, rng=rng),
    "shift": lambda labels, clients, rng: shift(np.array(labels, float), clients=clients, rng=rng),
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def skew(labels: np.ndarray, parts: list[Index]) -> float:
    """How far clients' label shares are from the table's: the mean total variation distance, in [0, 1)."""
    values = np.unique(labels)
    whole = np.array([(labels == v).mean() for v in values])
    return float(np.mean([np.abs([(labels[p] == v).mean() for v in values] - whole).sum() / 2 for p in parts]))


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=120), clients=st.integers(1, 10), seed=st.integers(0, 9)
)
def test_every_row_goes_to_exactly_one_client_and_every_client_gets_one(deal, labels, clients, seed):
    parts = deal(labels, clients, rng(seed))
    assert len(parts) == clients
    assert all(len(part) > 0 for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(part.dtype == np.int64 for part in parts)


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
def test_the_same_seed_deals_the_same_and_another_differently(deal):
    labels = rng(7).integers(0, 3, 90)

    def dealt(seed: int) -> list[list[int]]:
        return [part.tolist() for part in deal(labels, 5, rng(seed))]

    assert dealt(1) == dealt(1)
    assert dealt(1) != dealt(2)


@pytest.mark.parametrize("rows, clients", [(10, 3), (9, 3), (3, 3), (100, 7)])
def test_iid_parts_differ_by_one_row_at_most(rows, clients):
    sizes = [len(part) for part in iid(rows, clients=clients, rng=rng())]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_equal_rows_are_shuffled(name):
    first, *_ = DEALS[name]([0] * 1000, 4, rng())
    assert 400 < first.mean() < 600  # the first quarter in order would have mean 125


def test_a_large_alpha_approaches_iid_and_a_small_one_is_skewed():
    labels = rng().integers(0, 5, 4000)
    # A client's 400 rows have shares with a standard deviation of 0.02 a label when dealt iid.
    by_alpha = [skew(labels, dirichlet(labels, clients=10, alpha=a, rng=rng(1))) for a in (1e6, 10.0, 1.0, 0.1)]
    assert by_alpha[0] < 0.05
    assert by_alpha == sorted(by_alpha)
    assert by_alpha[-1] > 0.5
    assert skew(labels, iid(4000, clients=10, rng=rng(1))) < 0.05


def test_with_a_large_alpha_clients_are_of_one_size():
    sizes = [len(part) for part in dirichlet([0] * 1000, clients=10, alpha=1e6, rng=rng())]
    assert all(95 <= size <= 105 for size in sizes)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_alpha_is_an_error(alpha):
    with pytest.raises(DataError, match=r"dirichlet: alpha must be finite and greater than 0, got"):
        dirichlet([0, 1], clients=2, alpha=alpha, rng=rng())


def test_shards_are_of_one_size_and_hold_neighbours_in_label_order():
    labels = np.repeat(np.arange(10), 60)  # 600 rows, 20 shards of 30: each within one label
    parts = shards(labels, clients=10, per_client=2, rng=rng())
    assert [len(part) for part in parts] == [60] * 10
    assert all(len(set(labels[part])) <= 2 for part in parts)
    # In order, a client would have both shards of one label.
    assert any(np.ptp(labels[part]) > 1 for part in parts)


def test_as_many_shards_as_rows_are_dealt_and_no_more():
    assert len(shards([0] * 6, clients=3, per_client=2, rng=rng())) == 3
    with pytest.raises(DataError, match="6 rows cannot be dealt to 8 shards; each needs at least one"):
        shards([0] * 6, clients=4, per_client=2, rng=rng())


@pytest.mark.parametrize("per_client", [0, -1])
def test_a_client_needs_at_least_one_shard(per_client):
    with pytest.raises(DataError, match=f"shards: at least 1 a client is needed, got {per_client}"):
        shards([0, 1], clients=1, per_client=per_client, rng=rng())


@pytest.mark.parametrize("deal", [DEALS["iid"], DEALS["dirichlet"]], ids=["iid", "dirichlet"])
@pytest.mark.parametrize(
    "rows, clients, message",
    [
        (3, 4, "3 rows cannot be dealt to 4 clients; each needs at least one"),
        (3, 0, "at least 1 of clients is needed, got 0"),
        (3, -2, "at least 1 of clients is needed, got -2"),
        (0, 1, "0 rows cannot be dealt to 1 clients"),
    ],
)
def test_impossible_numbers_of_clients_are_errors(deal, rows, clients, message):
    with pytest.raises(DataError, match=message):
        deal([0] * rows, clients, rng())


def test_by_value_makes_one_client_a_value():
    parts = by_value(["paris", "lyon", "paris", "berlin"])
    assert {name: part.tolist() for name, part in parts.items()} == {"berlin": [3], "lyon": [1], "paris": [0, 2]}
    assert list(parts) == ["berlin", "lyon", "paris"]


@pytest.mark.parametrize("values", [[None, "None", "x"], [float("nan"), float("nan"), 1.0], [1, "1", True]])
def test_values_of_one_name_are_one_client_and_no_row_is_lost(values):
    assert sorted(np.concatenate(list(by_value(values).values()))) == [0, 1, 2]


# Skewed sizes, shifted features, and more clients than rows


def test_sizes_follow_a_power_law():
    parts = quantity(100_000, clients=50, exponent=1.0, rng=rng())
    sizes = sorted(map(len, parts), reverse=True)
    for k in (2, 5, 10, 50):
        assert sizes[k - 1] == pytest.approx(sizes[0] / k, rel=0.03)
    assert [len(part) for part in parts] != sizes  # which client is the largest is drawn
    assert {len(part) for part in quantity(100, clients=10, exponent=0.0, rng=rng())} == {10}


@given(rows=st.integers(1, 300), clients=st.integers(1, 300), exponent=st.sampled_from([0.0, 0.5, 1.0, 3.0, 50.0]))
def test_no_client_is_empty_however_skewed_sizes_are(rows, clients, exponent):
    if clients > rows:
        with pytest.raises(DataError, match="each needs at least one"):
            quantity(rows, clients=clients, exponent=exponent, rng=rng())
        return
    parts = quantity(rows, clients=clients, exponent=exponent, rng=rng())
    assert min(map(len, parts)) >= 1 and sum(map(len, parts)) == rows


def test_each_client_sees_its_own_range_of_a_shifted_feature():
    values = rng(3).normal(size=1000)
    values[::100] = np.nan
    parts = shift(values, clients=4, rng=rng())
    assert [len(part) for part in parts] == [250] * 4
    for one, other in pairwise(parts):
        assert np.nanmax(values[one]) <= np.nanmin(values[other])
    assert np.isnan(values[parts[-1]]).sum() == 10
    equal = shift(np.zeros(90), clients=3, rng=rng())  # equal values are dealt at random
    assert equal[0].tolist() != list(range(30))


def test_a_column_of_texts_cannot_be_shifted():
    with pytest.raises(DataError, match="shift: the column has no numbers"):
        shift(np.full(9, np.nan), clients=3, rng=rng())


def test_many_clients_draw_their_rows_from_a_small_table():
    parts = draw(60, clients=1000, each=20, rng=rng())
    assert len(parts) == 1000
    assert all(len(set(part.tolist())) == 20 for part in parts)
    times = np.bincount(np.concatenate(parts), minlength=60)
    assert abs(times - 1000 / 3).max() < 6 * np.sqrt(1000 * 2 / 9)


@pytest.mark.parametrize("each", [0, 61])
def test_more_rows_than_there_are_cannot_be_drawn(each):
    with pytest.raises(DataError, match=f"draw: a client can have from 1 to 60 rows of this table, got {each}"):
        draw(60, clients=2, each=each, rng=rng())


@pytest.mark.parametrize("exponent", [-1.0, np.inf, np.nan])
def test_an_exponent_that_is_none_is_refused(exponent):
    with pytest.raises(DataError, match="quantity: the exponent must be finite and not negative"):
        quantity(60, clients=2, exponent=exponent, rng=rng())


def test_very_many_clients_are_dealt_to_without_looking_at_all_of_them_for_each():
    parts = dirichlet([0, 1] * 40_000, clients=60_000, alpha=0.05, rng=rng())
    assert len(parts) == 60_000 and min(map(len, parts)) == 1
