"""What the host tells the lanes arrives as it was, as one array."""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.engine.lanes import DecodeLanes, GroupLanes
from apr_jax.engine.pack_arrays import pack_arrays, unpack_arrays


def lanes(shards, count):
    rng = np.random.default_rng(0)

    def ints(*shape):
        return rng.integers(-9, 9, (shards, count, *shape)).astype(np.int32)

    key_data = rng.integers(0, 2**32, (shards, count, 2), dtype=np.uint32)
    return DecodeLanes(ints(), ints(), ints(), ints(4), key_data, ints(), ints(3))


@pytest.mark.parametrize("shared", [False, True])
def test_every_array_arrives_as_it_was(shared):
    given = lanes(2, 5)
    given = GroupLanes(given, given.token + 1) if shared else given
    packed = pack_arrays(given)
    assert packed.words.shape == (2, 5, 14 if shared else 13)

    for shard in range(2):
        made = jax.jit(unpack_arrays)(dataclasses.replace(packed, words=packed.words[shard]))
        for theirs, ours in zip(jax.tree.leaves(given), jax.tree.leaves(made), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs[shard])


def test_the_same_shapes_are_the_same_program():
    one, other = (jax.tree.structure(pack_arrays(lanes(2, 5))) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


def test_what_is_not_packed_stays():
    given = lanes(1, 2)
    assert unpack_arrays(given) is given


def test_other_elements_are_refused():
    with pytest.raises(ValueError, match=r"4 bytes .*float64"):
        pack_arrays({"a": np.zeros((1, 2), np.float64)})
