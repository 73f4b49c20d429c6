"""Packing of the lanes' arrays into one, because each array that goes to the devices costs the host as much."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedArrays:
    """A tree of arrays [shards, L, ...] of 4 bytes an element, side by side as int32 [shards, L, W]."""

    words: Any
    parts: tuple[tuple[tuple[int, ...], str], ...] = dataclasses.field(metadata={"static": True})  # shape, dtype
    structure: Any = dataclasses.field(metadata={"static": True})


def pack_arrays(tree: Any) -> PackedArrays:
    """Pack a tree of NumPy arrays. Raise ValueError for an array whose elements have other than 4 bytes."""
    leaves, structure = jax.tree.flatten(tree)
    if any(leaf.dtype.itemsize != 4 for leaf in leaves):
        raise ValueError(f"elements of 4 bytes can be packed, not {[str(leaf.dtype) for leaf in leaves]}")
    words = [np.ascontiguousarray(leaf).view(np.int32).reshape(*leaf.shape[:2], -1) for leaf in leaves]
    parts = tuple((leaf.shape[2:], str(leaf.dtype)) for leaf in leaves)
    return PackedArrays(np.concatenate(words, axis=-1), parts, structure)


def unpack_arrays(packed: Any) -> Any:
    """Unpack the tree on a shard, as arrays [L, ...]. What is not packed stays as it is."""
    if not isinstance(packed, PackedArrays):
        return packed
    widths = [int(np.prod(shape)) for shape, _ in packed.parts]
    words = jnp.split(packed.words, np.cumsum(widths)[:-1], axis=-1)
    leaves = [
        jax.lax.bitcast_convert_type(part_LW, dtype).reshape(part_LW.shape[0], *shape)
        for part_LW, (shape, dtype) in zip(words, packed.parts, strict=True)
    ]
    return jax.tree.unflatten(packed.structure, leaves)
