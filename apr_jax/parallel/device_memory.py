"""The memory that a program can have on a device, here or only compiled for, and the memory that arrays take."""

import collections
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# What XLA's compilers say of devices that are not here: `exceeds available HBM (15.75G)`, and the datasheet's 80 GB.
_NOT_HERE = {"TPU v5 lite": int(15.75 * 2**30), "TPU v5": int(95.74 * 2**30), "NVIDIA H100 80GB HBM3": 80 * 10**9}
_GPU_SHARE = 0.75  # JAX's own default


def memory_limit(mesh: Mesh) -> int | None:
    """Return the bytes that JAX gives to programs on each device of a mesh, or None where nothing is known of it.

    A GPU's are three quarters of its memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. A CPU's devices
    share the machine's memory.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:  # it is only compiled for (aot/topology.py)
        return _limit_of_kind(device.device_kind, device.platform)
    return None if stats is None else stats.get("bytes_limit")


def local_bytes(tree: Any) -> int:
    """Return the bytes of a tree of arrays, or of shapes with shardings, on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def bytes_on(mesh: Mesh, tree: Any) -> int:
    """Return the bytes that a tree's arrays of JAX take on the fullest device of a mesh, of a CPU's on each alike."""
    held: collections.Counter[jax.Device] = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for device in leaf.devices() if isinstance(leaf, jax.Array) else ():
            held[device] += local_bytes(leaf)
    if mesh.devices.flat[0].platform == "cpu":
        return held.total() // mesh.size
    return max(held[device] for device in mesh.devices.flat)


def _limit_of_kind(kind: str, platform: str) -> int | None:
    sold = _NOT_HERE.get(kind)
    if sold is None or platform == "tpu":
        return sold
    return int(sold * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_SHARE)))
