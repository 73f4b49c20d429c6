"""The paged KV cache: all threads' keys and values, in pages of a fixed number of positions.

A *row* is one thread's cache in order of position. Its table names the pages that hold it. Page 0 of each shard is the
trash page: whatever has no place of its own is written there, and nobody reads it.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.model.head_tile import PLAIN, HeadTile
from apr_jax.model.online_softmax import Block

SPAN = 64  # positions of each row that XLA gathers at a time, rounded up to whole pages


def pages_per_span(page_size: int) -> int:
    """Return the pages of each row that XLA gathers at a time."""
    return -(-SPAN // page_size)


def pages_per_row(max_seq_len: int, page_size: int) -> int:
    """Return R, the pages of a row, whole spans of them."""
    span = pages_per_span(page_size)
    return -(-max_seq_len // (page_size * span)) * span


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """All pages, one array per layer and kind. Immutable; the engine donates it to each step.

    Attributes:
        keys, values: per layer `[shards, P, J, C, W]`, in the layout and dtype of a `HeadTile`. Where that is plain,
            this is `[shards, P, K, C, H]` in the compute dtype.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def create(
        cls, config: ModelConfig, num_shards: int, pages_per_shard: int, page_size: int, tile: HeadTile = PLAIN
    ) -> Self:
        """Allocate an empty cache. Its contents do not matter: what was never written is never read."""
        groups, width = config.num_kv_heads // tile.heads, tile.heads * config.head_dim + tile.padding
        shape = (num_shards, pages_per_shard, groups, page_size, width)
        keys, values = (
            tuple(jnp.zeros(shape, tile.page_dtype(config.compute_dtype)) for _ in range(config.num_layers))
            for _ in range(2)
        )
        return cls(keys, values)

    @property
    def page_size(self) -> int:
        """Return C, the positions of a page."""
        return self.keys[0].shape[-2]

    def layer(self, layer: int) -> Block:
        """Return one layer's pages of keys and of values."""
        return self.keys[layer], self.values[layer]

    def replace_layer(self, layer: int, pages: Block) -> Self:
        """Return the cache with other pages in one layer."""
        layers = zip((self.keys, self.values), pages, strict=True)
        return type(self)(*((*old[:layer], new, *old[layer + 1 :]) for old, new in layers))


def write_rows(
    pages: PagedKVCache,
    tables_LR: jax.Array,
    starts_L: jax.Array,
    counts_L: jax.Array,
    fresh: tuple[Block, ...],
    pages_touched: int,
) -> PagedKVCache:
    """Write each lane's `counts_L` new positions, from position `starts_L` on, into one shard's pages.

    Whole pages are rewritten (old contents merged with new), so that the update is a copy per page, not per token.
    Lanes and pages with nothing new write to the trash page.

    Args:
        fresh: per layer, keys and values `[L, K, C, H]`, C >= counts_L.
        pages_touched: pages over which a lane's new positions may spread, at most.
    """
    page_size, width = pages.page_size, fresh[0][0].shape[2]
    num_lanes, row_pages = tables_LR.shape
    touched = pages_touched
    offset_L = starts_L % page_size
    ordinals_LW = (starts_L // page_size)[:, None] + jnp.arange(touched)[None]
    # For every place of every touched page: which new position belongs there.
    source_LX = jnp.arange(touched * page_size)[None] - offset_L[:, None]
    is_new_LX = (source_LX >= 0) & (source_LX < counts_L[:, None])
    any_new_LW = jnp.any(is_new_LX.reshape(num_lanes, touched, page_size), axis=-1)
    targets_LW = jnp.take_along_axis(tables_LR, jnp.minimum(ordinals_LW, row_pages - 1), axis=1)
    targets_LW = jnp.where(any_new_LW, targets_LW, 0)
    source_LX = jnp.clip(source_LX, 0, width - 1)

    def write(pages_PKCH: jax.Array, fresh_LKCH: jax.Array) -> jax.Array:
        _, K, _, H = pages_PKCH.shape
        new = jnp.take_along_axis(fresh_LKCH, source_LX[:, None, :, None], axis=2)
        new = new.reshape(num_lanes, K, touched, page_size, H).transpose(0, 2, 1, 3, 4)
        old = pages_PKCH.at[targets_LW].get(mode="promise_in_bounds")
        is_new = is_new_LX.reshape(num_lanes, touched, 1, page_size, 1)
        merged = jnp.where(is_new, new, old).reshape(num_lanes * touched, K, page_size, H)
        # Apart from the update: where XLA's GPU compiler fuses the two, it copies all pages.
        merged = jax.lax.optimization_barrier(merged)  # type: ignore[no-untyped-call]
        return pages_PKCH.at[targets_LW.reshape(-1)].set(merged, mode="promise_in_bounds")

    keys = tuple(write(old, k) for old, (k, _) in zip(pages.keys, fresh, strict=True))
    values = tuple(write(old, v) for old, (_, v) in zip(pages.values, fresh, strict=True))
    return PagedKVCache(keys, values)


def copy_pages(pages: PagedKVCache, sources: jax.Array, targets: jax.Array) -> PagedKVCache:
    """Copy pages within one shard, in the order given (a page may be a target and later a source); int32 `[...]`
    each.

    Pairs of the trash page with itself do nothing.
    """

    def copy(step: jax.Array, pages: PagedKVCache) -> PagedKVCache:
        def move(pages_PKCH: jax.Array) -> jax.Array:
            page = jax.lax.dynamic_index_in_dim(pages_PKCH, sources[step], keepdims=True)
            return jax.lax.dynamic_update_index_in_dim(pages_PKCH, page, targets[step], axis=0)

        return jax.tree.map(move, pages)

    return jax.lax.fori_loop(0, sources.shape[0], copy, pages)
