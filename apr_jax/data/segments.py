"""Rows as kernels for packed segments want them: the lengths of segments beside the tokens (host side, NumPy only)."""

from collections.abc import Mapping

import numpy as np

from apr_jax.data.packing import Array

MIN_SLOTS = 8  # segments that a row has places for; further places come in powers of two, each a program of its own


def with_lengths(rows: Mapping[str, Array], groups: int) -> dict[str, Array]:
    """Return the rows `[B, T]` in another order, with int32 `lengths` `[B, M]` of their segments, padding included.

    Each of the `groups` (a microbatch's part on one device) gets about as many segments as the others, and its rows
    with fewer segments come first. A group's lengths fill its `rows x M` places in order, whichever row they are of; 0
    means no segment. So M follows the mean over a group's rows and not the row with most segments. The k-th segment of
    a group never begins before row k // M, whose place it takes: kernels count offsets from there.

    Args:
        rows: `segment_ids` among them; a multiple of `groups`.
        groups: parts of equally many consecutive rows.
    """
    begins_BT = np.diff(rows["segment_ids"], axis=1, prepend=-1) != 0
    deals = np.argsort(np.count_nonzero(begins_BT, axis=1), kind="stable").reshape(-1, groups)
    deals[1::2] = deals[1::2, ::-1]  # the group that got most of one deal gets least of the next
    order = deals.T.reshape(-1)
    begins_GT = begins_BT[order].reshape(groups, -1)
    most, size = int(np.count_nonzero(begins_GT, axis=1).max()), len(order) // groups
    slots = MIN_SLOTS
    while slots * size < most:
        slots *= 2
    lengths = np.zeros((groups, size * slots), np.int32)
    for group, begins_T in enumerate(begins_GT):
        starts = np.flatnonzero(begins_T)
        lengths[group, : len(starts)] = np.diff(starts, append=len(begins_T))
    return {**{name: x[order] for name, x in rows.items()}, "lengths": lengths.reshape(len(order), slots)}
