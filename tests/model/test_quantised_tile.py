"""Pages of 8 bits: what comes back, and what a page's rows hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.quantised_tile import QuantisedTile

X_LKCH = jax.random.normal(jax.random.key(0), (2, 3, 5, 16)) * jnp.asarray([1e-3, 1.0, 1e3]).reshape(1, 3, 1, 1)


def test_heads_come_back_within_half_a_step_of_their_own_largest():
    tile = QuantisedTile(dtype="float32")
    packed = tile.pack(X_LKCH)
    assert (packed.shape, packed.dtype) == ((2, 3, 5, 20), jnp.int8)
    steps = np.abs(X_LKCH).max(axis=-1, keepdims=True) / 127
    assert (np.abs(tile.unpack(packed) - X_LKCH) <= steps * 0.5001).all()
    np.testing.assert_array_equal(tile.rounded(X_LKCH), tile.unpack(packed))


def test_a_position_is_rounded_alone():
    """A token's bits do not depend on what else a page holds: it is written without a look at its neighbours."""
    tile = QuantisedTile(dtype="float32")
    np.testing.assert_array_equal(tile.pack(X_LKCH[:, :, 2:3]), tile.pack(X_LKCH)[:, :, 2:3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_stay_zeros_and_an_empty_page_is_finite(dtype):
    tile = QuantisedTile(dtype=dtype)
    assert not tile.rounded(jnp.zeros((1, 2, 16))).any()
    empty = tile.unpack(jnp.zeros((1, 2, 20), jnp.int8))
    assert empty.dtype == dtype
    assert not empty.any()
