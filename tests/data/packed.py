"""Packed rows, read back."""

from typing import Any

import numpy as np

from apr_jax.data.packing import Packing


def read_back(packing: Packing, values: Any) -> list[np.ndarray]:
    """Per-token values of the rows, [R, row_len], as one array a sequence, in the order given to `pack`."""
    spans = zip(packing.places.tolist(), packing.lengths.tolist(), strict=True)
    return [values[row, start : start + length] for (row, start), length in spans]
