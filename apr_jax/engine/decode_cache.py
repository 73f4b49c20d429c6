"""How a decode chunk reads and writes the cache: two ways with one face, `rollout.decode_attention`."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

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
from apr_jax.model.paged_attention import Impl
from apr_jax.model.paged_view import PagedView


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
        """The pages, with the first `counts_L` new positions of each lane in them, and the buffers again."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Rows packed once a chunk, new positions in a small buffer, written to the pages at the end."""

    pages: PagedKVCache
    rows: PackedRows
    own_LB: jax.Array
    tables_LR: jax.Array
    lengths_L: jax.Array
    layout: RowLayout
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
        touched = -(-(self.steps - 1) // self.layout.page_size) + 1
        pages = write_rows(self.pages, self.tables_LR, self.lengths_L, counts_L, carried, touched)
        return pages, self.rows.buffers


@dataclasses.dataclass(frozen=True)
class PagesInPlace:
    """Every step writes to the pages and attends to them where they lie, with a backend's kernel."""

    pages: PagedKVCache
    buffers: RowBuffers  # without any room
    tables_LR: jax.Array
    lengths_L: jax.Array
    layout: RowLayout
    impl: Impl
    carried_axis: int | None = None

    @property
    def view_axes(self) -> Any:
        return PagedView(None, 0, 0, None, 0, self.impl, self.layout.tile)  # type: ignore[arg-type]

    def start(self) -> PagedKVCache:
        return self.pages

    def view(self, carried: PagedKVCache, step: jax.Array, live_L: jax.Array) -> View:
        return PagedView(carried, self.tables_LR, self.lengths_L, step, live_L, self.impl, self.layout.tile)

    def finish(self, carried: PagedKVCache, counts_L: jax.Array) -> tuple[PagedKVCache, RowBuffers]:
        return carried, self.buffers


def open_cache(
    impl: str,
    layout: RowLayout,
    steps: int,
    pages: PagedKVCache,
    buffers: RowBuffers,
    tables_LR: jax.Array,
    lengths_L: jax.Array,
    live_L: jax.Array,
) -> DecodeCache:
    """The cache of a chunk of up to `steps` tokens a lane. `impl`: see `paged_attention.choose_impl`."""
    if impl != "packed":
        return PagesInPlace(pages, buffers, tables_LR, lengths_L, layout, impl)  # type: ignore[arg-type]
    rows, own_LB = pack_rows(buffers, pages, tables_LR, jnp.where(live_L, lengths_L, 0), layout)
    return PackedCache(pages, rows, own_LB, tables_LR, lengths_L, layout, steps)
