"""Lengths of packed segments as a kernel takes them."""

import numpy as np
import pytest

from apr_jax.data.segments import MIN_SLOTS, with_lengths


def random_rows(rows, length, seed=0):
    """Rows of few and of many segments; some end in padding, one is empty."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row in range(1, rows):
        cuts = np.sort(rng.choice(np.arange(1, length), rng.integers(0, 2 + 3 * row % 40), replace=False))
        ids[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
        ids[row, length - rng.integers(0, 9) :] *= rng.integers(0, 2)
    return {"segment_ids": ids, "number": np.arange(rows), "tokens": ids * 100 + np.arange(length)}


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (8, 1), (32, 4), (32, 32), (24, 3)])
def test_lengths_tell_the_segments_of_each_group_in_order(rows, groups):
    given = random_rows(rows, 120)
    packed = with_lengths(given, groups)
    assert sorted(packed["number"]) == list(range(rows))
    for name in ("segment_ids", "tokens"):
        np.testing.assert_array_equal(packed[name], given[name][packed["number"]])
    slots = packed["lengths"].shape[1]
    ids, lengths = (packed[name].reshape(groups, rows // groups, -1) for name in ("segment_ids", "lengths"))
    for ids_BT, lengths_BM in zip(ids, lengths, strict=True):
        flat = lengths_BM.reshape(-1)
        count = np.count_nonzero(flat)
        assert not flat[count:].any()
        begins = np.cumsum(flat)[:count] - flat[:count]
        assert flat.sum() == ids_BT.size, "every token is covered"
        changes = np.flatnonzero(np.diff(ids_BT, axis=1, prepend=-1).reshape(-1))
        np.testing.assert_array_equal(begins, changes)
        assert (begins >= np.arange(count) // slots * ids_BT.shape[1]).all(), "none begins before the row of its place"


def test_groups_share_rows_of_many_segments():
    """Rows of 1 to 60 segments, 30.5 on average: no row needs places for 60, in 6 groups of 10."""
    ids = np.stack([np.minimum(np.arange(256) * (n + 1) // 256, n) for n in range(60)]).astype(np.int32)
    assert with_lengths({"segment_ids": ids}, 6)["lengths"].shape == (60, 32)
    assert with_lengths({"segment_ids": ids[:9]}, 3)["lengths"].shape == (9, MIN_SLOTS)
