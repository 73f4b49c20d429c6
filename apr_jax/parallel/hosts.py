"""Several processes as one job ("hosts"), over jax.distributed.

A process learns its place from the environment, the same way from `launch/local_hosts.py` and from a cluster's script:

    APR_HOSTS=4 APR_HOST=1 APR_COORDINATOR=node0:9876     told: host 1 of 4, and where host 0 listens
    APR_HOSTS=auto                                        found out by JAX: Slurm, TPU pods, Open MPI
    APR_HEARTBEAT_SECONDS=20                              optional: when a host that is not heard of counts as dead

Without APR_HOSTS there is one host, and everything here costs nothing.

All hosts run the same program. `gather`, `from_first`, `whole`, a `Vote` and programs over the job's mesh must be
called by all of them in the same order; what decides whether one is called must be the same on all.
"""

import contextlib
import functools
import io
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the job's small shared memory has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError
from apr_jax.parallel.mesh import AXES, partition_spec, replicated

T = TypeVar("T")

_HEARTBEAT_SECONDS = "20"
_VERDICT_SECONDS = 20  # that a host in trouble waits at most
_START_SECONDS = 300  # until the last host must have joined
_END_SECONDS = 300  # that hosts wait for each other at the end: host 0 may still be writing a report
_STOP_KEYS = "apr_jax_stop"
_SMALLEST_BUFFER = 1 << 12


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the job that the environment names, before anything else touches JAX. Does nothing where it names none.

    A host that dies ends the others: JAX's coordination service misses its heartbeat after 20 seconds, says on standard
    error which host it was, and ends the process. An error of a collective comes sooner and names nobody; so the block
    waits for that verdict before it passes the error on.

    Raises ConfigError where the environment makes no sense.
    """
    place = _place_in_job()
    if place is None:
        yield
        return
    # It would take SIGTERM, which is `train.signals`'.
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    heartbeat = _positive("APR_HEARTBEAT_SECONDS", os.environ.get("APR_HEARTBEAT_SECONDS", _HEARTBEAT_SECONDS))
    jax.distributed.initialize(
        **place,
        heartbeat_timeout_seconds=heartbeat,
        initialization_timeout=_START_SECONDS,
        shutdown_timeout_seconds=_END_SECONDS,
    )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        print(f"host {jax.process_index()}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        print("Is another host dead? Waiting for the job's coordinator to say so.", file=sys.stderr, flush=True)
        time.sleep(min(heartbeat, _VERDICT_SECONDS) + 10)
        raise


def _place_in_job() -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None for a process on its own."""
    hosts = os.environ.get("APR_HOSTS")
    if hosts is None:
        return None
    if hosts == "auto":
        return {}
    if hosts == "1":
        return None
    missing = [name for name in ("APR_HOST", "APR_COORDINATOR") if name not in os.environ]
    if missing:
        raise ConfigError(f"APR_HOSTS={hosts} is set, and {missing[0]} is not")
    host, coordinator = os.environ["APR_HOST"], os.environ["APR_COORDINATOR"]
    count = _positive("APR_HOSTS", hosts)
    if not (host.isdecimal() and int(host) < count):
        raise ConfigError(f"APR_HOST={host}: takes one of 0 to {count - 1}, as APR_HOSTS={hosts}")
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ConfigError(f"APR_COORDINATOR={coordinator}: takes HOST:PORT")
    place = {"coordinator_address": coordinator, "num_processes": count, "process_id": int(host)}
    return {**place, "cluster_detection_method": "deactivate"}


def _positive(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value}: takes a positive whole number")
    return int(value)


def meet(mesh: Mesh) -> None:
    """Waits for all hosts, and connects those that programs over the job's mesh will connect.

    Between CPUs a group of devices that communicates for the first time has 30 seconds to come together (gloo). Hosts
    that have compiled a train step first may be further apart.
    """
    if jax.process_count() == 1:
        return
    split = [axis for axis in AXES if mesh.shape[axis] > 1]
    for axes in (axes for count in range(1, len(split) + 1) for axes in itertools.combinations(split, count)):
        _client().wait_at_barrier(f"apr_jax_meet/{'-'.join(axes)}", _START_SECONDS * 1_000)
        ones = np.ones([mesh.shape[axis] for axis in axes], np.float32)
        placed = place(ones, NamedSharding(mesh, partition_spec(*axes)))
        float(jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(placed))


def is_first() -> bool:
    """Whether this is host 0, which writes what a job leaves behind."""
    return jax.process_index() == 0


def messages() -> TextIO:
    """Where to tell a user how things go: standard error on host 0, nowhere on the others."""
    return sys.stderr if is_first() else _Nowhere()


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


def share(items: Sequence[T]) -> Sequence[T]:
    """This host's part of what all hosts have: neighbours, equally many as far as that goes."""
    hosts, host = jax.process_count(), jax.process_index()
    return items[len(items) * host // hosts : len(items) * (host + 1) // hosts]


def gather(value: T) -> list[T]:
    """Every host's `value`, in the order of hosts. It must pickle, and take less than 2 GiB."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    longest = max(_SMALLEST_BUFFER, int(np.max(lengths)))
    padded = np.zeros(1 << (longest - 1).bit_length(), np.uint8)  # few sizes: each is a program of its own
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on host 0, on all hosts; the others don't call it. For what only host 0 can know."""
    return gather(make() if is_first() else None)[0]  # type: ignore[return-value]


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every host holds whole, with the same values, on the job's devices.

    Args:
      shardings: the tree of `tree` with a sharding for each array, or one sharding for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return jax.device_put(value, sharding)  # it is on the devices of all hosts already
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda value: put(value, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def whole(array: jax.Array) -> np.ndarray:
    """All of an array, on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def rollout_mesh(mesh: Mesh) -> Mesh:
    """The mesh that this host rolls out on: its own devices of `mesh`, for an engine of its own.

    An engine splits its lanes over `data` and keeps whole copies of the weights over `fsdp`, where it would compute
    everything again. So what the trainer has as fsdp, its mesh has as data: (data * fsdp, 1, tensor), less the rows
    of other hosts. Where a host has only a part of a tensor group, it splits heads over as many devices as divide both.
    """
    host, tensor = jax.process_index(), mesh.shape["tensor"]
    own = [device for device in mesh.devices.flat if device.process_index == host]
    if not _has_whole_rows(mesh):
        tensor = int(np.gcd(tensor, len(own)))
    return Mesh(np.asarray(own).reshape(-1, 1, tensor), AXES, axis_types=mesh.axis_types)


def _has_whole_rows(mesh: Mesh) -> bool:
    """Whether no host has only a part of a tensor group."""
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return all(len({device.process_index for device in row}) == 1 for row in rows)


class Localiser:
    """Brings arrays from the job's mesh to each host's `rollout_mesh`, over the network and through no file."""

    def __init__(self, mesh: Mesh, shardings: Any) -> None:
        """`shardings`: of the arrays on the job's mesh, split over "tensor" only, or not at all."""
        self._mesh = rollout_mesh(mesh)
        self._shardings = shardings
        if not _has_whole_rows(mesh):
            self._shardings = jax.tree.map(lambda _: replicated(mesh), shardings)
        self._bring = jax.jit(lambda tree: tree, out_shardings=self._shardings)

    def __call__(self, tree: Any) -> Any:
        """The tree of arrays, split over "tensor" in the same way on this host's devices."""
        return jax.tree.map(self._here, self._bring(tree), self._shardings)

    def _here(self, array: jax.Array, sharding: NamedSharding) -> jax.Array:
        there = {shard.device: shard.data for shard in array.addressable_shards}
        parts = [there[device] for device in self._mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(self._mesh, sharding.spec), parts)


class Vote:
    """Lets hosts agree on what any of them wants, without waiting: a round's outcome is known in the next round."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, partition_spec(AXES))
        self._count = jax.jit(lambda votes: votes.max(), out_shardings=replicated(mesh))
        self._last: jax.Array | None = None

    def cast(self, wish: bool) -> bool:
        """This host's vote of this round. Returns whether any host wished so in the round before."""
        last, size = self._last, self._sharding.mesh.size
        mine = functools.partial(np.full, (1,), wish, np.int32)
        self._last = self._count(jax.make_array_from_callback((size,), self._sharding, lambda _: mine()))
        return last is not None and bool(last)


def tell_stop() -> None:
    """Lets all hosts know that one of them was asked to stop."""
    _client().key_value_set(f"{_STOP_KEYS}/{jax.process_index()}", "", allow_overwrite=True)


def was_told_stop() -> bool:
    """Whether a host has called `tell_stop`. Asks host 0, which takes a fraction of a millisecond."""
    return bool(_client().key_value_dir_get(_STOP_KEYS))


def _client() -> Any:
    return distributed.global_state.client
