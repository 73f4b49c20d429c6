"""The machine's limits, measured, and the least time that a decode step can take under them.

The roofline model (Williams, Waterman and Patterson 2009): a step moves bytes and does floating-point operations, and
takes at least the longer of the two times. The limits are the best rates that the mesh's devices reach together, on
programs that do nothing else. An accelerator repeats its work within one program: what the host adds to a program, some
10 microseconds or more, is as long as it takes an H100 to read 30 MB.
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

_REPEATS = 5
_COLUMNS = 4096  # of the matrix that is read


@dataclasses.dataclass(frozen=True)
class _Effort:
    """The size of one measurement on a platform."""

    bytes: int  # of the matrix that each device reads; several times its caches
    turns: int  # reads, or products, in one program
    sizes: tuple[int, ...]  # of the square matrices that are multiplied


_ON_CPU = _Effort(256 << 20, 1, (1024, 2048))
_ELSEWHERE = _Effort(1 << 30, 32, (4096, 8192))


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates that all devices of a mesh reach together."""

    bytes_per_second: float
    flops_per_second: float

    def __mul__(self, part: float) -> "Limits":
        """Return the limits of a part of the devices."""
        return Limits(self.bytes_per_second * part, self.flops_per_second * part)

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
    devices, platform = mesh.size, mesh.devices.flat[0].platform
    effort = _ON_CPU if platform == "cpu" else _ELSEWHERE
    split = NamedSharding(mesh, partition_spec(AXES))
    matrix = jnp.ones((devices, effort.bytes // _COLUMNS // 4, _COLUMNS), jnp.float32, device=split)
    seconds = min(_best(functools.partial(read, effort.turns), matrix) for read in (sum_rows, apply_to_vector))
    del matrix
    ways: list[Callable[[Any], Any]] = [functools.partial(multiply, effort.turns)]
    if cpu := cpu_kernels(platform):
        ways.append(functools.partial(_square_by_kernel, mesh, cpu.DECODING[dtype]))
    flops = 0.0
    for size in effort.sizes:
        squares = _random_squares(devices, size, dtype, split)
        flops = max(flops, *(effort.turns * 2 * devices * size**3 / _best(way, squares) for way in ways))
    return Limits(devices * effort.turns * effort.bytes / seconds, flops)


def _random_squares(devices: int, size: int, dtype: str, split: NamedSharding) -> jax.Array:
    """Draw matrices whose powers neither grow nor vanish. Products of zeros and ones take a GPU less power and time."""

    def draw() -> jax.Array:
        return (jax.random.normal(jax.random.key(0), (devices, size, size)) * size**-0.5).astype(dtype)

    return jax.jit(draw, out_shardings=split)()


# Each turn of a loop needs the one before, so that none is left out; loops of one turn are none. Compiled once, however
# often the limits are measured.


@functools.partial(jax.jit, static_argnums=0)
def sum_rows(turns: int, x_dRC: jax.Array) -> jax.Array:
    """Read matrices of ones `turns` times, each in a sum. Returns the sums of their rows."""

    def turn(_: jax.Array, sums_dR: jax.Array) -> jax.Array:
        return jnp.sum(jnp.maximum(x_dRC, sums_dR[:, :1, None] - x_dRC.shape[-1]), axis=-1)

    return jax.lax.fori_loop(0, turns, turn, jnp.zeros(x_dRC.shape[:2], x_dRC.dtype))


@functools.partial(jax.jit, static_argnums=0)
def apply_to_vector(turns: int, x_dRC: jax.Array) -> jax.Array:
    """Read matrices of ones `turns` times, each in a product with a vector of ones. Returns what the last one gave."""

    def turn(_: jax.Array, products_dR: jax.Array) -> jax.Array:
        ones_dC = products_dR[:, : x_dRC.shape[-1]] / x_dRC.shape[-1]
        return jnp.einsum("dRC,dC->dR", x_dRC, ones_dC)

    return jax.lax.fori_loop(0, turns, turn, jnp.full(x_dRC.shape[:2], x_dRC.shape[-1], x_dRC.dtype))


@functools.partial(jax.jit, static_argnums=0)
def multiply(turns: int, x_dAB: jax.Array) -> jax.Array:
    """Return the power `turns + 1` of square matrices, by as many products as turns."""

    def turn(_: jax.Array, power_dBC: jax.Array) -> jax.Array:
        return jnp.einsum("dAB,dBC->dAC", x_dAB, power_dBC)

    return jax.lax.fori_loop(0, turns, turn, x_dAB)


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
    """The reads and operations of one decode step, without activations, which stay in caches."""

    bytes: float
    flops: float

    @classmethod
    def of(cls, model: ModelConfig, lanes: int, context: float, page_dtype: str = "compute") -> "StepCost":
        """Count for the lanes of one data shard, which reads its weights once for all of them.

        New tokens attend to `context` positions on average.
        """
        tile = QuantisedTile(dtype=model.compute_dtype) if page_dtype == "int8" else PLAIN
        head = (model.head_dim + tile.padding) * jnp.dtype(tile.page_dtype(model.compute_dtype)).itemsize
        kv_bytes = 2 * model.num_layers * model.num_kv_heads * head
        read = HeldWeights.of(model, XLA, own_head=True).num_bytes() + lanes * context * kv_bytes
        matrices = num_params(model).non_embedding + model.embed_dim * model.vocab_size
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
        return cls(read, lanes * (2 * matrices + attention))

    def __mul__(self, shards: int) -> "StepCost":
        return StepCost(self.bytes * shards, self.flops * shards)

    def seconds(self, limits: Limits) -> float:
        """Return the least time under the limits."""
        return max(self.bytes / limits.bytes_per_second, self.flops / limits.flops_per_second)
