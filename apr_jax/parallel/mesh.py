"""The device mesh, and the rules that map an array's logical axes to the mesh's axes.

A mesh has three axes. `data` splits the batch and keeps a copy of the weights on each shard; `fsdp` splits the batch
and the weights' embed axis; `tensor` splits heads, the MLP and the vocabulary (Megatron). Axis types are Auto, so the
partitioner places the collectives.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from apr_jax.caches import check_compiled_programs
from apr_jax.config import ConfigError, MeshConfig
from apr_jax.config_fields import BY_DEVICES

_log = logging.getLogger(__name__)

DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)

_MIN_CPU_DEVICES = 8
_ALL_OF_A_CPU = 2


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with axes ("data", "fsdp", "tensor") over the first of `devices`, by default of all of JAX's.

    With `data=-1` the mesh takes all devices. Devices of JAX's that it leaves idle are named in a warning.

    A machine with nothing but a CPU splits it into as many devices as the mesh needs, unless JAX has started already
    or `JAX_NUM_CPU_DEVICES` sets their number. With `data=-1` these are two on every machine, so that a run's last bits
    do not depend on its number of cores.

    Raises ConfigError with both numbers if the mesh needs more devices than there are, or does not divide them. In a
    job of several hosts the mesh must use them all.
    """
    if devices is None:
        devices = _devices_for(config)
    needed = config.fsdp * config.tensor
    if config.data == BY_DEVICES:
        if len(devices) % needed:
            raise ConfigError(
                f"mesh.data=-1 takes all {len(devices)} devices, and mesh.fsdp={config.fsdp} * mesh.tensor="
                f"{config.tensor} = {needed} does not divide them; set mesh.data, or other sizes of these two"
            )
        config = dataclasses.replace(config, data=len(devices) // needed)
    shape = (config.data, config.fsdp, config.tensor)
    needed *= config.data
    if needed > len(devices):
        raise ConfigError(
            f"mesh.data={config.data} * mesh.fsdp={config.fsdp} * mesh.tensor={config.tensor} needs {needed} devices, "
            f"but there are {len(devices)}; mesh.data=-1 takes those that there are"
        )
    hosts = len({device.process_index for device in devices})
    if hosts > 1 and needed != len(devices):
        raise ConfigError(
            f"mesh.data={config.data} * mesh.fsdp={config.fsdp} * mesh.tensor={config.tensor} needs {needed} devices, "
            f"but the job's {hosts} hosts have {len(devices)}; use all of them (mesh.data=-1)"
        )
    types = (AxisType.Auto,) * len(AXES)
    if num_slices(devices) > 1:
        return Mesh(slices_along_data(shape, devices[:needed]), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=tuple(devices[:needed]))


def num_slices(devices: Sequence[Any]) -> int:
    """Return the number of TPU slices that devices belong to; 1 for anything else."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def slices_along_data(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Lay out the devices of several TPU slices in a grid, one slice after the other along `data`.

    Between slices lies the data centre's network. So it carries the sum of gradients, once a step, and no weights.
    Raises ConfigError where `data` does not divide into the slices.
    """
    slices = num_slices(devices)
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data={shape[0]} must be a multiple of {slices}, the job's TPU slices: fsdp and tensor stay in one"
        )
    inside = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)


def _devices_for(config: MeshConfig) -> Sequence[jax.Device]:
    """Return JAX's devices, of a CPU that nobody else has split those that the mesh needs."""
    one_shard = config.fsdp * config.tensor
    wanted = max(1, _ALL_OF_A_CPU // one_shard if config.data == BY_DEVICES else config.data) * one_shard
    offer_cpu_devices(wanted)
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1 and not _is_split_outside():
        return devices[:wanted]
    if config.data != BY_DEVICES and config.data * one_shard < len(devices):
        _warn_of_idle(config, len(devices))
    return devices


@functools.cache  # once a process
def _warn_of_idle(config: MeshConfig, there: int) -> None:
    one_shard = config.fsdp * config.tensor
    most, used = there // one_shard, config.data * one_shard
    advice = f"mesh.data={-1 if most * one_shard == there else most} uses {most * one_shard}"
    if most == config.data:
        advice = f"sizes of mesh.fsdp and mesh.tensor whose product divides {there} can use all"
    _log.warning(
        f"{there - used} of {there} devices are idle: mesh.data={config.data} * mesh.fsdp={config.fsdp} * "
        f"mesh.tensor={config.tensor} uses {used}; {advice}"
    )


def _is_split_outside() -> bool:
    """Return True where the environment says how many devices a CPU has."""
    return "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")


def offer_cpu_devices(count: int = _MIN_CPU_DEVICES) -> None:
    """Split a CPU into at least `count` devices. Once JAX has started, do nothing.

    The default serves callers that do not know the mesh yet. More devices than cores are slower (docs/decode.md).
    """
    check_compiled_programs()
    if not _is_split_outside():
        with contextlib.suppress(RuntimeError):  # JAX has started
            offered = max(count, os.cpu_count() or 1)
            jax.config.update("jax_num_cpu_devices", offered)  # type: ignore[no-untyped-call]


def partition_spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Return a `PartitionSpec`, with types."""
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
        """Return the spec of an array whose axes have these names.

        Raises ConfigError for an unknown name, and for two axes of one array on the same mesh axis.
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
    """Return the tree of `params` with a NamedSharding for each array.

    Args:
        params: arrays, or their `jax.ShapeDtypeStruct`s.
        logical_axes: the same tree with a `PartitionSpec` of logical names a leaf (`llama.logical_axes(params)`).

    Raises ConfigError with both numbers if a mesh axis does not divide the array's axis that it splits.
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
    """Split the longest axis of `shape` that divides over `data` as well. Return `sharding` itself if none does."""
    mesh = sharding.mesh
    splits = [() if axis is None else (axis,) if isinstance(axis, str) else tuple(axis) for axis in sharding.spec]
    parts = [int(np.prod([mesh.shape[name] for name in (*split, DATA_AXIS)])) for split in splits]
    dividing = [axis for axis, size in enumerate(shape) if size % parts[axis] == 0]
    if not dividing:
        return sharding
    chosen = max(dividing, key=lambda axis: shape[axis])
    splits[chosen] = (*splits[chosen], DATA_AXIS)
    return NamedSharding(mesh, partition_spec(*(split or None for split in splits)))


def over_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Map a function that the partitioner cannot see into over the ambient mesh, if that has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def num_row_shards() -> int:
    """Return the number of shards of a batch's rows on the ambient mesh (`use_abstract_mesh`); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_shards(mesh)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of shards of a batch's rows on a mesh."""
    return mesh.shape[DATA_AXIS] * mesh.shape[FSDP_AXIS]


def split_rows(x: jax.Array) -> jax.Array:
    """Split activations `[B, T, ..]` by rows over the ambient mesh. Without a mesh, return them as they are.

    Left to itself the partitioner lets activations follow the weights' split over "fsdp", which takes far more memory
    and communication (docs/scale.md).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    constrain: Any = jax.lax.with_sharding_constraint
    return constrain(x, partition_spec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, partition_spec())
