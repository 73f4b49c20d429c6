"""Prefill: computes keys and values of tokens that threads were given. Two strategies behind one interface.

`PagePerLane` works everywhere: a lane computes up to a page of one thread's new positions, which a second program then
writes. `InPlace` is for kernels that attend after all lanes are written: lanes are filled from any threads.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from apr_jax.engine.lanes import PrefillLanes, lane_spans
from apr_jax.engine.limits import Limits
from apr_jax.engine.pack_arrays import PackedArrays, unpack_arrays
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.sharded import PAGES, SHARDED, ShardedStep
from apr_jax.engine.thread_cache import PrefillChunk
from apr_jax.kernels import DecodeKernels, InPlacePrefill
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.llama import Llama
from apr_jax.model.online_softmax import Block
from apr_jax.model.paged_attention import Places
from apr_jax.model.paged_cache import PagedKVCache, write_rows
from apr_jax.model.views.decode import paged_lanes
from apr_jax.model.views.prefill import prefill_rows
from apr_jax.parallel.mesh import partition_spec


class Prefill(Protocol):
    """A strategy: which chunks a call takes, how many lanes it has, and the device programs that compute it."""

    num_lanes: int  # of a call, on one shard
    width: int  # positions of a row that one lane computes
    aligned: bool  # a lane's first place stands for a position that is a multiple of `width`
    steps: dict[str, ShardedStep]

    def take(self, scheduler: Scheduler, shard: int) -> list[PrefillChunk]:
        """Take a shard's part of the next call from the scheduler, which counts it as computed from now on."""

    def arguments(self, pages: PagedKVCache, params: Any, lanes: Any) -> dict[str, tuple[Any, ...]]:
        """Return what each of `steps` is called with, or arrays' shapes, for a call with these arguments."""

    def __call__(self, pages: PagedKVCache, params: Any, lanes: Any) -> PagedKVCache:
        """Compute the lanes' new positions and write them to the pages, which are donated."""


def choose_prefill(
    structure: Any, kernels: DecodeKernels, limits: Limits, mesh: Mesh, tracing: Callable[[], Any]
) -> Prefill:
    """Return the strategy for an engine with these kernels.

    `structure` is the model's graph, `tracing` makes the context in which its programs are traced.
    """
    return (
        PagePerLane(structure, kernels.attention.tile, limits, mesh, tracing)
        if kernels.prefill is None
        else InPlace(structure, kernels.prefill, limits, mesh, tracing)
    )


class PagePerLane:
    """Each lane computes up to one page of one thread's new positions; all are written after they are computed."""

    aligned = False

    def __init__(self, structure: Any, tile: HeadTile, limits: Limits, mesh: Mesh, tracing: Callable[[], Any]):
        self.num_lanes, self.width = limits.prefill_lanes, limits.page_size
        self._fresh_sharding = NamedSharding(mesh, PAGES)

        def compute(pages: PagedKVCache, params: Any, lanes: PrefillLanes | PackedArrays) -> tuple[Block, ...]:
            return compute_pages(nnx.merge(structure, params), tile, pages, unpack_arrays(lanes))

        def write(pages: PagedKVCache, lanes: PrefillLanes | PackedArrays, fresh: tuple[Block, ...]) -> PagedKVCache:
            fresh, each = jax.tree.map(tile.pack, fresh), unpack_arrays(lanes)
            return write_rows(pages, each.tables, each.start, each.count, fresh, 1)

        whole, out = partition_spec(), self._fresh_sharding
        self._compute = ShardedStep(compute, mesh, (SHARDED, whole, SHARDED), out, donated=(), tracing=tracing)
        self._write = ShardedStep(write, mesh, (SHARDED, SHARDED, SHARDED), out)
        self.steps = {"prefill": self._compute, "prefill_write": self._write}

    def take(self, scheduler: Scheduler, shard: int) -> list[PrefillChunk]:
        """Take one chunk a thread: a thread's next page attends to this one, which must be written before."""
        chunks = scheduler.prefill_chunks(shard)
        for chunk in chunks:
            scheduler.cache.prefilled(chunk)
        return chunks

    def arguments(self, pages: PagedKVCache, params: Any, lanes: Any) -> dict[str, tuple[Any, ...]]:
        shape: Callable[..., Any] = jax.ShapeDtypeStruct
        fresh = self._compute.jitted.eval_shape(pages, params, lanes)
        fresh = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=self._fresh_sharding), fresh)
        return {"prefill": (pages, params, lanes), "prefill_write": (pages, lanes, fresh)}

    def __call__(self, pages: PagedKVCache, params: Any, lanes: Any) -> PagedKVCache:
        return self._write(pages, lanes, self._compute(pages, params, lanes))


class InPlace:
    """Each lane computes a unit of one thread's positions and writes it to its page before any lane attends."""

    aligned = True

    def __init__(self, structure: Any, kernel: InPlacePrefill, limits: Limits, mesh: Mesh, tracing: Callable[[], Any]):
        positions = -(-limits.prefill_lanes * limits.page_size // kernel.block) * kernel.block
        self.num_lanes, self.width = positions // kernel.unit, kernel.unit

        def prefill(pages: PagedKVCache, params: Any, lanes: PrefillLanes | PackedArrays) -> PagedKVCache:
            return compute_in_place(nnx.merge(structure, params), kernel, pages, unpack_arrays(lanes))

        out = NamedSharding(mesh, PAGES)
        self._prefill = ShardedStep(prefill, mesh, (SHARDED, partition_spec(), SHARDED), out, tracing=tracing)
        self.steps = {"prefill": self._prefill}

    def take(self, scheduler: Scheduler, shard: int) -> list[PrefillChunk]:
        """Take chunk after chunk, several of a thread among them, until the call is full."""
        lanes, taken = self.num_lanes, list[PrefillChunk]()
        while chunks := scheduler.prefill_chunks(shard):
            for chunk in chunks:
                needed = len(lane_spans(chunk, self.width, self.aligned))
                if needed > lanes:
                    return taken
                lanes -= needed
                scheduler.cache.prefilled(chunk)
                taken.append(chunk)
        return taken

    def arguments(self, pages: PagedKVCache, params: Any, lanes: Any) -> dict[str, tuple[Any, ...]]:
        return {"prefill": (pages, params, lanes)}

    def __call__(self, pages: PagedKVCache, params: Any, lanes: Any) -> PagedKVCache:
        return self._prefill(pages, params, lanes)


def compute_pages(model: Llama, tile: HeadTile, pages: PagedKVCache, lanes: PrefillLanes) -> tuple[Block, ...]:
    """Compute keys and values of up to one page of new positions for each lane of a shard (no shard axis).

    Pages are only read. They are written by a program of its own: in one program XLA would copy every page.

    Returns:
        Per layer keys and values, each `[L, K, W, H]`.
    """
    starts_L = jnp.where(lanes.count > 0, lanes.start, 0)
    view = prefill_rows(model.config, pages, starts_L, lanes.tables, lanes.tokens.shape[1], tile)
    _, view = model(lanes.tokens, view)
    return view.fresh


def compute_in_place(model: Llama, kernel: InPlacePrefill, pages: PagedKVCache, lanes: PrefillLanes) -> PagedKVCache:
    """Compute and write lanes of a unit each, as decode does it (no shard axis).

    A loop over blocks of lanes, as many as are used. Outside of a loop XLA would copy the pages.
    """
    unit, size = kernel.unit, kernel.block // kernel.unit

    def block(index: jax.Array, pages: PagedKVCache) -> PagedKVCache:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), lanes)
        positions = ((part.start // unit * unit)[:, None] + jnp.arange(unit)[None]).reshape(-1)
        starts, ends = (jnp.repeat(x, unit) for x in (part.start, part.start + part.count))
        places = Places(positions, (positions >= starts) & (positions < ends), part.tables)
        view = paged_lanes(model.config, pages, places, kernel.attention)
        _, view = model(part.tokens.reshape(-1), view)
        return view.pages

    used = jnp.sum((lanes.count > 0).astype(jnp.int32))
    return jax.lax.fori_loop(0, (used + size - 1) // size, block, pages)
