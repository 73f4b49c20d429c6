"""Several processes ("hosts") as one job, over jax.distributed.

A process learns its place from the environment, which `launch/local_hosts.py` or a cluster's script sets:

    APR_HOSTS=4 APR_HOST=1 APR_COORDINATOR=node0:9876     host 1 of 4, and the address where host 0 listens
    APR_HOSTS=auto                                        JAX finds the place: Slurm, TPU pods, Open MPI
    APR_HEARTBEAT_SECONDS=20                              optional: a host silent for so long counts as dead
    APR_MEET_SECONDS=300                                  optional: hosts wait so long for each other at the start

Without APR_HOSTS there is one host, and everything here costs nothing.

All hosts run the same program. They must call `gather`, `from_first`, `whole_array`, a `Vote` and programs over the
job's mesh in the same order, so a decision to call one must be the same on all hosts.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from jax._src import (  # what finds a cluster and the job's small shared memory have no public names
    clusters,
    distributed,
)
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ConfigError
from apr_jax.parallel import meeting, wire
from apr_jax.parallel.meeting import Place
from apr_jax.parallel.mesh import AXES, partition_spec, replicated
from apr_jax.stopping import StoppedAtOnceError, StoppedError

T = TypeVar("T")

_HEARTBEAT_SECONDS = 20
_VERDICT_SECONDS = 20
_MEET_SECONDS = 300
_NEVER_SECONDS = 7 * 24 * 3600
_START_SECONDS = 300  # in which JAX must have started everywhere
_END_SECONDS = 300  # hosts wait so long for each other at the end: host 0 may still be writing a report
_STOP_KEYS = "apr_jax_stop"
_SMALLEST_BUFFER = 1 << 12
_PACKAGE = pathlib.Path(__file__).parents[1]
_VERSIONS = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
    "tokenizers",
)
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable", "jax_default_prng_impl")


@contextlib.contextmanager
def joined(record: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Join the job that the environment names, before anything else touches JAX. Without a job, do nothing.

    The hosts meet first (`meeting.meet`) and compare `record()`, which must be the same on all, and their versions. A
    host that dies, fails or is silent for APR_HEARTBEAT_SECONDS ends the others with a sentence that names it.

    Raises:
      ConfigError: the environment makes no sense, or the hosts differ.
      TimeoutError, ConnectionError: a host is missing.
    """
    place, devices = _place_in_job()
    if place is None:
        yield
        return
    heartbeat = _seconds("APR_HEARTBEAT_SECONDS", _HEARTBEAT_SECONDS)
    _end_with_launcher()
    bind = place.bind_address() if place.host == 0 else None
    company = meeting.meet(place, {**record(), **_software()}, _seconds("APR_MEET_SECONDS", _MEET_SECONDS), bind)
    # JAX's service would take SIGTERM, which belongs to `stopping`.
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    company.watch(heartbeat)
    jax.distributed.initialize(
        coordinator_address=place.address if place.host == 0 else meeting.tunnel(place.endpoint),
        num_processes=place.count,
        process_id=place.host,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=_START_SECONDS,
        heartbeat_timeout_seconds=_NEVER_SECONDS,  # `company` watches
        shutdown_timeout_seconds=_END_SECONDS,
        coordinator_bind_address=bind,
    )
    try:
        yield
    except StoppedAtOnceError as error:
        company.failed(error)
        raise
    except StoppedError:
        company.done()  # all hosts stop at the same step
        raise
    except jax.errors.JaxRuntimeError as error:
        time.sleep(min(heartbeat, _VERDICT_SECONDS) + 1)  # another's death is a failed collective: `company` names it
        company.failed(error)
        raise
    except BaseException as error:
        company.failed(error)
        raise
    company.done()


def _place_in_job() -> tuple[Place | None, Sequence[int] | None]:
    """Return this process's place, or None if it is on its own, and its devices, or None for all."""
    hosts = os.environ.get("APR_HOSTS", "1")
    if hosts == "auto":
        return _place_in_cluster()
    if hosts == "1":
        return None, None
    missing = [name for name in ("APR_HOST", "APR_COORDINATOR") if name not in os.environ]
    if missing:
        raise ConfigError(f"APR_HOSTS={hosts} is set, but {missing[0]} is not; set it too")
    host, coordinator = os.environ["APR_HOST"], os.environ["APR_COORDINATOR"]
    count = _positive("APR_HOSTS", hosts)
    if not (host.isdecimal() and int(host) < count):
        raise ConfigError(f"APR_HOST={host} must lie in 0..{count - 1}, because APR_HOSTS={hosts}")
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ConfigError(f"APR_COORDINATOR={coordinator} must be HOST:PORT")
    return Place(int(host), count, coordinator), None


def _place_in_cluster() -> tuple[Place, Sequence[int] | None]:
    """Return the place that JAX finds, and the devices that it gives to a task of its own."""
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    address, count, host, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        given, None, None, None, None, _MEET_SECONDS
    )
    if address is None or count is None or host is None:
        raise ConfigError("APR_HOSTS=auto, but JAX finds no cluster here (Slurm, TPU pod, Open MPI); set APR_HOSTS=N")
    return Place(host, count, address), None if "JAX_LOCAL_DEVICE_IDS" in os.environ else devices


def _seconds(name: str, default: int) -> int:
    return _positive(name, os.environ.get(name, str(default)))


def _software() -> dict[str, str]:
    """Return all that must be the same on every host whatever the job is: versions, code, and JAX's own settings."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cc", ".h"):
            digest.update(path.read_bytes())
    settings = {name: str(getattr(jax.config, name)) for name in _SETTINGS}
    versions = {name: metadata.version(name) for name in _VERSIONS}
    return {"python": platform.python_version(), "apr_jax's code": digest.hexdigest()[:16], **versions, **settings}


def _end_with_launcher() -> None:
    """End this process when `launch/local_hosts.py`, which started it, is gone."""
    launcher = os.environ.get("APR_LAUNCHER")
    if launcher is None:
        return

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _positive(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value} must be a positive whole number")
    return int(value)


def meet(mesh: Mesh) -> None:
    """Wait for all hosts, and open the connections that programs over the job's mesh will use.

    CPUs that communicate for the first time have 30 seconds to meet (gloo). Hosts that compile a train step first may
    be further apart than that.
    """
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        raise ConfigError(
            f"this process is one of {jax.process_count()} of a TPU pod, and APR_HOSTS is not set; start it with "
            "APR_HOSTS=auto on every host (launch/cluster/tpu_pod.sh does)"
        )
    split = [axis for axis in AXES if mesh.shape[axis] > 1]
    for axes in (axes for count in range(1, len(split) + 1) for axes in itertools.combinations(split, count)):
        _client().wait_at_barrier(f"apr_jax_meet/{'-'.join(axes)}", _START_SECONDS * 1_000)
        ones = np.ones([mesh.shape[axis] for axis in axes], np.float32)
        placed = place(ones, NamedSharding(mesh, partition_spec(*axes)))
        float(jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(placed))


def is_first() -> bool:
    """Return True on host 0, which writes the job's files."""
    return jax.process_index() == 0


def messages() -> TextIO:
    """Return the stream for messages to the user: standard error on host 0, nowhere on the others."""
    return sys.stderr if is_first() else _Nowhere()


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


def own_part(items: Sequence[T]) -> Sequence[T]:
    """Return this host's part of a sequence that all hosts hold: neighbours, as evenly as it divides."""
    hosts, host = jax.process_count(), jax.process_index()
    return items[len(items) * host // hosts : len(items) * (host + 1) // hosts]


def gather(value: T, types: Collection[type] = ()) -> list[T]:
    """Return every host's `value`, in the order of hosts. It becomes less than 2 GiB, and `wire.encode` takes it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(wire.encode(value, types), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    longest = max(_SMALLEST_BUFFER, int(np.max(lengths)))
    padded = np.zeros(1 << (longest - 1).bit_length(), np.uint8)  # few sizes, because each compiles a program
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [wire.decode(row[:length].tobytes(), types) for row, length in zip(rows, lengths, strict=True)]


def from_first(make: Callable[[], T], types: Collection[type] = ()) -> T:
    """Return on all hosts what `make` returns on host 0 (as `gather` takes it). Only host 0 calls it."""
    return gather(make() if is_first() else None, types)[0]  # type: ignore[return-value]


def check_same(what: str, value: str) -> None:
    """Raise ConfigError on all hosts, naming `what`, unless all have the same value."""
    found = meeting.differences({host: {what: theirs} for host, theirs in enumerate(gather(value))})
    if found is not None:
        raise ConfigError(found)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays that every host holds whole, with the same values, on the job's devices.

    Args:
      tree: the arrays.
      shardings: the same tree with a sharding for each array, or one sharding for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return jax.device_put(value, sharding)  # on the devices of all hosts already
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda value: put(value, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def whole_array(array: jax.Array) -> np.ndarray:
    """Return all of an array, on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def rollout_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh of this host's own engine, made of its own devices of the job's `mesh`.

    An engine splits its lanes over `data`; along `fsdp` it would only repeat the same work. So the trainer's fsdp axis
    becomes data: the mesh is (data * fsdp, 1, tensor) without the rows of other hosts. A host that holds only a part of
    a tensor group splits heads over the greatest common divisor of the group's size and its own number of devices.
    """
    host, tensor = jax.process_index(), mesh.shape["tensor"]
    own = [device for device in mesh.devices.flat if device.process_index == host]
    if not _has_whole_rows(mesh):
        tensor = int(np.gcd(tensor, len(own)))
    return Mesh(np.asarray(own).reshape(-1, 1, tensor), AXES, axis_types=mesh.axis_types)


def _has_whole_rows(mesh: Mesh) -> bool:
    """Return True if every tensor group lies on one host."""
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return all(len({device.process_index for device in row}) == 1 for row in rows)


def bring_home(array: jax.Array, spec: PartitionSpec, dtype: str) -> jax.Array:
    """Return an array of the job's mesh on this host's `rollout_mesh`, over the network and through no file.

    All hosts call it. It is converted before it is sent, and split as `spec` says: over "tensor" or not at all.
    """
    mesh: Any = array.sharding.mesh  # type: ignore[attr-defined]
    there = NamedSharding(mesh, spec) if _has_whole_rows(mesh) else replicated(mesh)
    parts = {shard.device: shard.data for shard in _gathering(there, dtype)(array).addressable_shards}
    here = rollout_mesh(mesh)
    return jax.make_array_from_single_device_arrays(
        array.shape, NamedSharding(here, there.spec), [parts[device] for device in here.devices.flat]
    )


@functools.cache
def _gathering(there: NamedSharding, dtype: str) -> Any:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=there)


class Vote:
    """A vote by which hosts learn what any of them wants. Nobody waits: a round's outcome is known in the next one."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, partition_spec(AXES))
        self._count = jax.jit(lambda votes: votes.max(), out_shardings=replicated(mesh))
        self._last: jax.Array | None = None

    def cast(self, wish: bool) -> bool:
        """Cast this host's vote. Return True if any host wished so in the round before."""
        last, size = self._last, self._sharding.mesh.size
        mine = functools.partial(np.full, (1,), wish, np.int32)
        self._last = self._count(jax.make_array_from_callback((size,), self._sharding, lambda _: mine()))
        return last is not None and bool(last)


def tell_stop() -> None:
    """Tell all hosts that this one was asked to stop."""
    _client().key_value_set(f"{_STOP_KEYS}/{jax.process_index()}", "", allow_overwrite=True)


def was_told_stop() -> bool:
    """Return True if a host has called `tell_stop`. This asks host 0, which takes a fraction of a millisecond."""
    return bool(_client().key_value_dir_get(_STOP_KEYS))


def _client() -> Any:
    return distributed.global_state.client
