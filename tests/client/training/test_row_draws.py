"""A row's mask follows from the row alone; units are dropped at their rate, each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from client.training.row_draws import masks, row_ids

KEY = bytes(range(32))


def ids(*digests: int) -> np.ndarray:
    return row_ids(np.array(digests, np.uint64))


def test_equal_rows_are_told_apart_by_which_copy_they_are():
    found = ids(7, 5, 7, 2**64 - 1, 5, 7)
    assert found.tolist() == [[7, 0], [5, 0], [7, 1], [2**64 - 1, 0], [5, 1], [7, 2]]
    assert ids().shape == (0, 2)


def test_a_row_that_comes_leaves_the_masks_of_the_others():
    before, after = ids(7, 5, 9, 7), ids(7, 3, 5, 9, 7)
    old, new = (torch.cat(masks(each, [50, 30], rate=0.4, key=KEY), 1) for each in (before, after))
    assert torch.equal(new[[0, 2, 3, 4]], old)
    assert len({tuple(row.tolist()) for row in new}) == 5  # and each row has one of its own, copies too


def test_a_mask_does_not_depend_on_the_batch():
    all_, widths = ids(*range(100)), [13, 6]
    together = masks(all_, widths, rate=0.3, key=KEY)
    for picked in ([3], [99, 3, 50], [3, 3]):
        for part, whole in zip(masks(all_[picked], widths, rate=0.3, key=KEY), together, strict=True):
            assert torch.equal(part, whole[picked])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_units_are_dropped_at_their_rate_and_each_by_itself(rate):
    rows, widths = 4000, (33, 20)
    first, second = masks(row_ids(np.arange(rows, dtype=np.uint64)), widths, rate=rate, key=KEY)
    assert (first.shape, second.shape) == ((rows, 33), (rows, 20))
    values = torch.cat([first, second], 1).numpy()
    assert set(np.unique(values)) == {0.0, 1 / (1 - rate)}  # so that the mean is 1
    dropped = (values == 0).astype(float)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) < 5 * deviation / np.sqrt(dropped.size)
    assert np.abs(np.corrcoef(dropped, rowvar=False) - np.eye(53)).max() < 6 / np.sqrt(rows)
    expected = rows * np.array([1 - rate, rate])
    assert stats.chisquare([rows - dropped[:, 0].sum(), dropped[:, 0].sum()], expected).pvalue > 1e-6


def test_another_key_gives_other_masks():
    (one,), (other,) = (masks(ids(*range(9)), [40], rate=0.5, key=key) for key in (KEY, bytes(32)))
    assert not torch.equal(one, other)
