"""The machine's limits, measured, and the least time that a decode step can take under them.

The roofline model (Williams, Waterman and Patterson 2009): a step moves bytes and does floating-point operations, and
takes at least the longer of the two times. The limits are the best rates that the mesh's devices reach together, on
programs that do nothing else.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ModelConfig
from apr_jax.kernels import cpu_kernels
from apr_jax.model.head_tile import PLAIN
from apr_jax.model.held_weights import HeldWeights
from apr_jax.model.ops import XLA, Ops
from apr_jax.model.params import num_params
from apr_jax.model.quantised_tile import QuantisedTile
from apr_jax.parallel.mesh import AXES, partition_spec

_BYTES = 256 << 20  # that each device reads
_REPEATS = 5

# Compiled once, however often the limits are measured.
_sum_rows = jax.jit(lambda x: jnp.sum(x, axis=1))
_apply = jax.jit(lambda x: jnp.einsum("dRC,C->dR", x, jnp.ones(x.shape[-1:], x.dtype)))
_square = jax.jit(lambda x: jnp.einsum("dAB,dBC->dAC", x, x))


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates that all devices of a mesh reach together."""

    bytes_per_second: float
    flops_per_second: float

    def better(self, other: "Limits") -> "Limits":
        """Return the higher of each, because noise only ever slows a measurement down."""
        return Limits(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )


def measure_limits(mesh: Mesh, dtype: str) -> Limits:
    """Read a large matrix (in a sum, and in a product with a vector), and multiply large square matrices in `dtype`.

    The matrix that is read is float32, which every backend reads at its memory's rate. A CPU also multiplies by our own
    kernel, and the faster way counts, because XLA's CPU backend is as slow in bfloat16 as in float32.
    """
    devices, on_cpu = mesh.size, mesh.devices.flat[0].platform == "cpu"
    split = NamedSharding(mesh, partition_spec(AXES))
    columns = 4096
    matrix = jnp.ones((devices, _BYTES // columns // 4, columns), jnp.float32, device=split)
    seconds = min(_best(read, matrix) for read in (_sum_rows, _apply))
    del matrix
    ways: list[Callable[[Any], Any]] = [_square]
    if cpu := cpu_kernels(mesh.devices.flat[0].platform):
        ways.append(functools.partial(_square_by_kernel, mesh, cpu.DECODING[dtype]))
    flops = 0.0
    for size in (1024, 2048) if on_cpu else (4096, 8192):
        squares = jnp.ones((devices, size, size), dtype, device=split)
        flops = max(flops, *(2 * devices * size**3 / _best(way, squares) for way in ways))
    return Limits(devices * _BYTES / seconds, flops)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _square_by_kernel(mesh: Mesh, ops: Ops, x: jax.Array) -> jax.Array:
    def local(x_1AB: jax.Array) -> jax.Array:
        size = x_1AB.shape[-1]
        held = jax.eval_shape(ops.hold, x_1AB[0])
        (product,) = ops.matmul(x_1AB, [x_1AB.reshape(held.shape)], [size])
        return product

    spec = partition_spec(AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def _best(step: Callable[[Any], Any], argument: Any) -> float:
    """Return the seconds of the fastest of some calls, after one that compiles."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    wait(step(argument))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        wait(step(argument))
        times.append(time.perf_counter() - start)
    return min(times)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The reads and operations of one decode step of all lanes, without activations, which stay in caches."""

    bytes: float
    flops: float

    @classmethod
    def of(cls, model: ModelConfig, lanes: int, context: float, page_dtype: str = "compute") -> "StepCost":
        """Count for new tokens that attend to `context` positions on average. Weights are read once for all."""
        tile = QuantisedTile(dtype=model.compute_dtype) if page_dtype == "int8" else PLAIN
        head = (model.head_dim + tile.padding) * jnp.dtype(tile.page_dtype(model.compute_dtype)).itemsize
        kv_bytes = 2 * model.num_layers * model.num_kv_heads * head
        read = HeldWeights.of(model, XLA, own_head=True).num_bytes() + lanes * context * kv_bytes
        matrices = num_params(model).non_embedding + model.embed_dim * model.vocab_size
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
        return cls(read, lanes * (2 * matrices + attention))

    def seconds(self, limits: Limits) -> float:
        """Return the least time under the limits."""
        return max(self.bytes / limits.bytes_per_second, self.flops / limits.flops_per_second)
