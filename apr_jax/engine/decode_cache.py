"""How a decode chunk reads and writes the cache: two layouts behind one interface, `engine.decode_attention`."""

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.config import ModelConfig
from apr_jax.model.kv_cache import (
    Block,
    DecodeView,
    PackedRows,
    PagedKVCache,
    RowBuffers,
    RowLayout,
    pack_rows,
    write_rows,
)
from apr_jax.model.llama import KVCache
from apr_jax.model.paged_attention import HeadTile, Impl, check_page_size, choose_impl
from apr_jax.model.paged_view import PagedView
from apr_jax.parallel.mesh import TENSOR_AXIS


class View(KVCache, Protocol):
    """One thread's cache in one step."""

    @property
    def length(self) -> jax.Array:
        """int32 scalar, positions in the row before the chunk."""
        ...

    @property
    def step(self) -> jax.Array:
        """int32 scalar, steps of the chunk before this one."""
        ...

    @property
    def carried(self) -> Any:
        """What a step hands to the next one."""
        ...


class DecodeCache(Protocol):
    """The cache of one decode chunk on one shard. The loop carries `start()`, then `carried` of a step's last view."""

    @property
    def view_axes(self) -> Any:
        """Which parts of a view are a lane's own, for `jax.vmap`."""
        ...

    @property
    def carried_axis(self) -> int | None:
        """Whether what is carried is a lane's own (0) or one for all lanes (None)."""
        ...

    def start(self) -> Any: ...

    def view(self, carried: Any, step: jax.Array, live_L: jax.Array) -> View:
        """What the lanes' threads see in a step; `live_L` says which of them write."""
        ...

    def finish(self, carried: Any, counts_L: jax.Array) -> tuple[PagedKVCache, RowBuffers]:
        """The pages, with the first `counts_L` new positions of each lane in them, and the buffers."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Rows gathered once a chunk, new positions in a small buffer, written to the pages at the end."""

    pages: PagedKVCache
    rows: PackedRows
    own_LB: jax.Array
    tables_LR: jax.Array
    lengths_L: jax.Array
    steps: int
    carried_axis: int | None = 0

    @property
    def view_axes(self) -> Any:
        return DecodeView(rows=None, own_B=0, fresh=0, length=0, step=None)  # type: ignore[arg-type]

    def start(self) -> tuple[Block, ...]:
        _, K, _, H = self.pages.keys[0].shape
        zeros = jnp.zeros((len(self.lengths_L), K, self.steps, H), self.pages.keys[0].dtype)
        return tuple((zeros, zeros) for _ in self.pages.keys)

    def view(self, carried: tuple[Block, ...], step: jax.Array, live_L: jax.Array) -> View:
        return DecodeView(self.rows, self.own_LB, carried, self.lengths_L, step)

    def finish(self, carried: tuple[Block, ...], counts_L: jax.Array) -> tuple[PagedKVCache, RowBuffers]:
        touched = -(-(self.steps - 1) // self.pages.page_size) + 1
        pages = write_rows(self.pages, self.tables_LR, self.lengths_L, counts_L, carried, touched)
        return pages, self.rows.buffers


@dataclasses.dataclass(frozen=True)
class PagesInPlace:
    """Every step writes to the pages and attends to them where they lie, with a backend's kernel."""

    pages: PagedKVCache
    buffers: RowBuffers  # none
    tables_LR: jax.Array
    lengths_L: jax.Array
    impl: Impl
    tile: HeadTile
    carried_axis: int | None = None

    @property
    def view_axes(self) -> Any:
        return PagedView(None, 0, 0, None, 0, self.impl, self.tile)  # type: ignore[arg-type]

    def start(self) -> PagedKVCache:
        return self.pages

    def view(self, carried: PagedKVCache, step: jax.Array, live_L: jax.Array) -> View:
        return PagedView(carried, self.tables_LR, self.lengths_L, step, live_L, self.impl, self.tile)

    def finish(self, carried: PagedKVCache, counts_L: jax.Array) -> tuple[PagedKVCache, RowBuffers]:
        return carried, self.buffers


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Which decode attention an engine uses, and how rows and heads lie in its cache for it."""

    impl: Literal["packed"] | Impl
    layout: RowLayout

    @classmethod
    def of(cls, config: ModelConfig, requested: str, page_size: int, mesh: Mesh) -> "DecodePlan":
        """`requested` is `engine.decode_attention`. Raises ConfigError for a page that the kernel cannot take."""
        impl = choose_impl(requested, mesh.devices.flat[0].platform, config.compute_dtype)
        check_page_size(impl, page_size)
        tile = HeadTile.of(impl, config.head_dim, config.num_kv_heads // mesh.shape[TENSOR_AXIS])
        return cls(impl, RowLayout.of(config.max_seq_len, page_size, tile))

    def row_blocks(self, lanes: int, pages: int) -> int:
        """Blocks of rows that may be read at once: what the buffers hold; pages in place need none, so all of them."""
        rows, every = self.layout, lanes * self.layout.num_blocks
        return min(every, max(rows.num_blocks, pages // rows.pages_per_block + lanes)) if self._packed else every

    def buffers(self, config: ModelConfig, num_shards: int, row_blocks: int, lanes: int) -> RowBuffers:
        """Room for the rows of `lanes` lanes a shard."""
        return RowBuffers.create(config, num_shards, self.layout, row_blocks, lanes) if self._packed else RowBuffers(())

    @property
    def _packed(self) -> bool:
        return self.impl == "packed"


class Lanes(Protocol):
    """What a cache needs to know of a chunk's lanes."""

    @property
    def tables(self) -> jax.Array: ...
    @property
    def length(self) -> jax.Array: ...
    @property
    def remaining(self) -> jax.Array: ...


def open_cache(plan: DecodePlan, steps: int, pages: PagedKVCache, buffers: RowBuffers, lanes: Lanes) -> DecodeCache:
    """The cache of a chunk of up to `steps` tokens a lane (one shard, no shard axis)."""
    if plan.impl != "packed":
        return PagesInPlace(pages, buffers, lanes.tables, lanes.length, plan.impl, plan.layout.tile)
    lengths_L = jnp.where(lanes.remaining > 0, lanes.length, 0)
    rows, own_LB = pack_rows(buffers, pages, lanes.tables, lengths_L, plan.layout)
    return PackedCache(pages, rows, own_LB, lanes.tables, lanes.length, steps)
