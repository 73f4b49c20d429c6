"""The device mesh, and the rules that map logical axes of arrays to its physical axes.

A mesh has three axes. `data` splits the batch and keeps a copy of the weights per shard; `fsdp` splits the batch and
the weights' embed axis; `tensor` splits heads, the MLP and the vocabulary (Megatron). Axis types are Auto: the
partitioner places the collectives.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ConfigError, MeshConfig

DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)

_MIN_CPU_DEVICES = 8


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp", "tensor") over the first devices, all of JAX's by default.

    On a machine whose only device is the CPU, the CPU serves as so many devices as the mesh needs, unless JAX has
    started already or their number was set from outside (`JAX_NUM_CPU_DEVICES`).

    Raises ConfigError with both numbers when the mesh needs more devices than there are, or in a job of several hosts
    another number.
    """
    shape = (config.data, config.fsdp, config.tensor)
    needed = int(np.prod(shape))
    if devices is None:
        offer_cpu_devices(needed)
        devices = jax.devices()
    if needed > len(devices):
        raise ConfigError(
            f"mesh.data={config.data} * mesh.fsdp={config.fsdp} * mesh.tensor={config.tensor} needs {needed} devices, "
            f"and there are {len(devices)}"
        )
    hosts = len({device.process_index for device in devices})
    if hosts > 1 and needed != len(devices):
        raise ConfigError(
            f"mesh.data={config.data} * mesh.fsdp={config.fsdp} * mesh.tensor={config.tensor} needs {needed} devices, "
            f"and the job's {hosts} hosts have {len(devices)}: all of them must be used"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=tuple(devices[:needed]))


def offer_cpu_devices(count: int = _MIN_CPU_DEVICES) -> None:
    """Splits a CPU into at least `count` devices; nothing once JAX has started.

    Whoever doesn't know the mesh yet offers enough for most. More devices than cores are slower: on two cores, decoding
    with 8 instead of 2 took 1.15 times as long (docs/decode.md).
    """
    set_outside = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")
    if not set_outside:
        with contextlib.suppress(RuntimeError):  # JAX has started
            offered = max(count, os.cpu_count() or 1)
            jax.config.update("jax_num_cpu_devices", offered)  # type: ignore[no-untyped-call]


def partition_spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """A `PartitionSpec`, typed."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axis that splits each logical axis; None leaves it whole."""

    embed: str | None = FSDP_AXIS
    heads: str | None = TENSOR_AXIS
    kv_heads: str | None = TENSOR_AXIS
    mlp: str | None = TENSOR_AXIS
    vocab: str | None = TENSOR_AXIS

    def spec(self, logical: Sequence[str | None]) -> PartitionSpec:
        """The physical spec of an array whose axes have these names.

        Raises ConfigError for an unknown name, and when two axes of one array would be split by one mesh axis.
        """
        names = {field.name for field in dataclasses.fields(self)}
        unknown = [name for name in logical if name is not None and name not in names]
        if unknown:
            raise ConfigError(f"logical axis {unknown[0]!r} has no rule; rules: {', '.join(sorted(names))}")
        physical = [None if name is None else getattr(self, name) for name in logical]
        counts = collections.Counter(axis for axis in physical if axis is not None)
        for axis, count in counts.items():
            if count > 1:
                raise ConfigError(f"mesh axis {axis!r} would split {count} axes of one array, {tuple(logical)}")
        return partition_spec(*physical)


RULES = Rules()


def param_shardings(mesh: Mesh, params: Any, logical_axes: Any, rules: Rules = RULES) -> Any:
    """The tree of `params` with a NamedSharding for each array.

    Args:
        params: arrays, or their `jax.ShapeDtypeStruct`s.
        logical_axes: the same tree with a `PartitionSpec` of logical names a leaf (`llama.logical_axes(params)`).

    Raises ConfigError with both numbers when a mesh axis does not divide the array's axis that it splits.
    """

    def sharding(path: Any, leaf: Any, logical: PartitionSpec) -> NamedSharding:
        spec = rules.spec(tuple(logical))
        for size, name, axis in zip(leaf.shape, logical, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: its axis {name!r} of {size} is not a "
                    f"multiple of mesh.{axis}={mesh.shape[axis]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params, logical_axes)


def split_over_data(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The sharding with the longest axis of `shape` that divides split over data, too; the same where none does."""
    mesh = sharding.mesh
    splits = [() if axis is None else (axis,) if isinstance(axis, str) else tuple(axis) for axis in sharding.spec]
    parts = [int(np.prod([mesh.shape[name] for name in (*split, DATA_AXIS)])) for split in splits]
    dividing = [axis for axis, size in enumerate(shape) if size % parts[axis] == 0]
    if not dividing:
        return sharding
    chosen = max(dividing, key=lambda axis: shape[axis])
    splits[chosen] = (*splits[chosen], DATA_AXIS)
    return NamedSharding(mesh, partition_spec(*(split or None for split in splits)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows `[B, ...]` over data and fsdp; the other axes whole."""
    return NamedSharding(mesh, partition_spec(BATCH_AXES))


def ambient_platform() -> str:
    """What the ambient mesh's devices are: a program may be compiled for others than are here. "cpu", "tpu", .."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else str(device.platform)


def over_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Maps a function that is opaque to the partitioner over the ambient mesh, if there is one of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def num_row_shards() -> int:
    """Devices of the ambient mesh (`use_abstract_mesh`) that have rows of their own; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def split_rows(x: jax.Array) -> jax.Array:
    """Activations `[B, T, ..]` split by rows over the ambient mesh, whole otherwise; as they are where there is none.

    Left to itself the partitioner lets activations follow the weights' split over "fsdp": for the 7B model on a mesh of
    (1, 8, 1) an SFT step then needed 86 GB of temporaries a device, and reduced activations in every product.
    """
    if jax.sharding.get_abstract_mesh().empty or x.ndim < 3:
        return x
    constrain: Any = jax.lax.with_sharding_constraint
    rows: jax.Array = constrain(x, partition_spec(BATCH_AXES))
    return rows


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, partition_spec())
