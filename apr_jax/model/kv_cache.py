"""The paged KV cache and what a forward sees of it.

Letters as in `llama.py`; besides, S positions of one block of a row, C new positions of one chunk or one page.

A *row* is one thread's cache in order of position, cut into blocks of S positions. Attention goes over the blocks in
order with an online softmax (Milakov and Gimelshein 2018), then over the new positions. A block that is wholly masked
changes no bit of the result, so a thread's result does not depend on how far the longest of its neighbours reaches,
and blocks behind that are skipped. Prefill gathers each block from the pages where it uses it. Decode uses every
block at every step, so it keeps the rows of its lanes contiguous (`DecodeRows`), and brings them up to date from the
pages once per chunk.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig

MIN_BLOCK = 128  # positions; large enough to amortise a matmul's overhead
MAX_BLOCKS = 8  # of a row; each is a branch in the compiled program
MASKED_SCORE = -1e30

Block = tuple[jax.Array, jax.Array]  # keys and values [K, S, H]
Carry = tuple[jax.Array, jax.Array, jax.Array]  # running maximum and sum [K, M], weighted values [K, M, H]; float32


def _zeros(shape: tuple[int, ...], config: ModelConfig) -> jax.Array:
    return jnp.zeros(shape, config.compute_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """All pages, one array per layer and kind. Immutable; the engine donates it to each step."""

    keys: tuple[jax.Array, ...]  # per layer [shards, P, K, page, H], compute dtype; page 0 of each shard is trash
    values: tuple[jax.Array, ...]

    @classmethod
    def create(cls, config: ModelConfig, num_shards: int, pages_per_shard: int, page_size: int) -> Self:
        """An empty cache. Only shapes matter: what was never written is never read."""
        shape = (num_shards, pages_per_shard, config.num_kv_heads, page_size, config.head_dim)
        keys, values = (tuple(_zeros(shape, config) for _ in range(config.num_layers)) for _ in range(2))
        return cls(keys, values)

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[-2]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a row of `max_seq_len` positions is cut into blocks of whole pages."""

    num_blocks: int
    pages_per_block: int
    page_size: int

    @classmethod
    def of(cls, max_seq_len: int, page_size: int) -> Self:
        size = max(MIN_BLOCK, -(-max_seq_len // MAX_BLOCKS))
        pages_per_block = max(1, -(-size // page_size))
        return cls(-(-max_seq_len // (pages_per_block * page_size)), pages_per_block, page_size)

    @property
    def block_size(self) -> int:
        return self.pages_per_block * self.page_size

    @property
    def pages_per_row(self) -> int:
        return self.num_blocks * self.pages_per_block

    def blocks_for(self, length: jax.Array) -> jax.Array:
        """Blocks that hold `length` positions."""
        return (length + self.block_size - 1) // self.block_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """The rows of the decode lanes, a copy of what their pages hold. Immutable and donated, as the pages are."""

    blocks: tuple[tuple[Block, ...], ...]  # per layer, per block: keys and values [shards, L, K, S, H]

    @classmethod
    def create(cls, config: ModelConfig, num_shards: int, num_lanes: int, layout: RowLayout) -> Self:
        shape = (num_shards, num_lanes, config.num_kv_heads, layout.block_size, config.head_dim)
        return cls(
            tuple(
                tuple((_zeros(shape, config), _zeros(shape, config)) for _ in range(layout.num_blocks))
                for _ in range(config.num_layers)
            )
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Refresh:
    """Which pages are to be copied into which rows."""

    counts: jax.Array  # int32 [.., blocks]: entries of each block's list
    entries: jax.Array  # int32 [.., blocks, L x pages of a block, 3]: lane, place of the page in the block, page


def refresh_rows(rows: DecodeRows, pages: PagedKVCache, refresh: Refresh, layout: RowLayout) -> DecodeRows:
    """Copies pages into rows (one shard, no shard axis); the work is that of the pages named, not of the rows' size."""

    def copy_into(block: int) -> list[Block]:
        def copy(index: jax.Array, layers: list[Block]) -> list[Block]:
            lane, place, page = refresh.entries[block, index]

            def move(row_LKSH: jax.Array, pages_PKCH: jax.Array) -> jax.Array:
                content = jax.lax.dynamic_index_in_dim(pages_PKCH, page)
                start = (lane, jnp.int32(0), place * layout.page_size, jnp.int32(0))
                return jax.lax.dynamic_update_slice(row_LKSH, content, start)

            return [(move(k, pages.keys[layer]), move(v, pages.values[layer])) for layer, (k, v) in enumerate(layers)]

        return jax.lax.fori_loop(0, refresh.counts[block], copy, [layer[block] for layer in rows.blocks])

    by_block = [copy_into(block) for block in range(layout.num_blocks)]
    return DecodeRows(tuple(zip(*by_block, strict=True)))


def _merge(carry: Carry, q_KMH: jax.Array, block: Block, mask_MS: jax.Array) -> Carry:
    """Adds a block of keys and values to an online softmax; M = query heads of one kv head x query positions."""
    top_KM, sum_KM, out_KMH = carry
    k_KSH, v_KSH = block
    mask_1MS = mask_MS[None]
    scores = jnp.einsum("KMH,KSH->KMS", q_KMH, k_KSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_1MS, scores, MASKED_SCORE)
    new_top = jnp.maximum(top_KM, jnp.max(scores, axis=-1))
    weights = jnp.where(mask_1MS, jnp.exp(scores - new_top[..., None]), 0.0)
    scale = jnp.exp(top_KM - new_top)
    values = jnp.einsum("KMS,KSH->KMH", weights.astype(v_KSH.dtype), v_KSH, preferred_element_type=jnp.float32)
    return new_top, sum_KM * scale + jnp.sum(weights, axis=-1), out_KMH * scale[..., None] + values


def _attend(
    q_TNH: jax.Array,
    row: Sequence[Callable[[], Block]],
    size: int,
    num_blocks: jax.Array,
    length: jax.Array,
    new: Block,
    new_mask_TC: jax.Array,
) -> jax.Array:
    """Attention of one thread's T queries to its row's first `length` positions and to C new ones. Returns `[T, N, H]`.

    `row` gives the row's blocks of `size` positions each; those from `num_blocks` on are not asked for.
    """
    T, N, H = q_TNH.shape
    K = new[0].shape[0]
    G = N // K
    q_KMH = (q_TNH / math.sqrt(H)).astype(q_TNH.dtype).reshape(T, K, G, H).transpose(1, 2, 0, 3).reshape(K, G * T, H)
    carry = (
        jnp.full((K, G * T), MASKED_SCORE, jnp.float32),
        jnp.zeros((K, G * T), jnp.float32),
        jnp.zeros((K, G * T, H), jnp.float32),
    )
    for index, block in enumerate(row):
        mask_MS = jnp.broadcast_to(index * size + jnp.arange(size)[None] < length, (G * T, size))

        def merge(carry: Carry, block: Callable[[], Block] = block, mask_MS: jax.Array = mask_MS) -> Carry:
            return _merge(carry, q_KMH, block(), mask_MS)

        carry = jax.lax.cond(index < num_blocks, merge, lambda carry: carry, carry)
    C = new[0].shape[1]
    mask_MC = jnp.broadcast_to(new_mask_TC[None], (G, T, C)).reshape(G * T, C)
    _, sum_KM, out_KMH = _merge(carry, q_KMH, new, mask_MC)
    out_KGTH = (out_KMH / sum_KM[..., None]).reshape(K, G, T, H)
    return out_KGTH.transpose(2, 0, 1, 3).reshape(T, N, H).astype(q_TNH.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeView:
    """One thread's cache inside a decode chunk: its row as it was before the chunk, and what the chunk has added.

    New keys and values stand at the chunk's step, which is the same number for every lane, so that lifting over lanes
    keeps the write a slice update.
    """

    row: tuple[tuple[Block, ...], ...]  # per layer, per block
    fresh: tuple[Block, ...]  # per layer, keys and values [K, C, H]; C = steps of a chunk
    length: jax.Array  # int32 scalar, positions in the row
    num_blocks: jax.Array  # int32 scalar, blocks that any lane needs (the same for all lanes)
    step: jax.Array  # int32 scalar, steps of the chunk before this one (the same for all lanes)

    def attend(
        self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, Self]:
        """See `llama.KVCache`. T = 1, and `positions_T` = length + step."""
        del positions_T
        new = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, fresh.transpose(1, 0, 2), self.step, axis=1)
            for old, fresh in zip(self.fresh[layer], (k_TKH, v_TKH), strict=True)
        )
        block: Block = (new[0], new[1])
        mask_TC = jnp.arange(block[0].shape[1])[None] <= self.step
        row = [lambda old=old: old for old in self.row[layer]]
        size = self.row[layer][0][0].shape[1]
        out = _attend(q_TNH, row, size, self.num_blocks, self.length, block, mask_TC)
        return out, dataclasses.replace(self, fresh=(*self.fresh[:layer], block, *self.fresh[layer + 1 :]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillView:
    """One thread's cache in a prefill call: all pages and its table, and the new positions of one page."""

    pages: PagedKVCache  # one shard's (the same for all lanes)
    table_R: jax.Array  # int32, the row's pages; entries without one name the trash page
    fresh: tuple[Block, ...]  # per layer computed so far, keys and values [K, C, H]
    length: jax.Array  # int32 scalar, positions in the row
    num_blocks: jax.Array  # int32 scalar, blocks that any lane needs (the same for all lanes)
    layout: RowLayout = dataclasses.field(metadata={"static": True})

    def attend(
        self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, Self]:
        """See `llama.KVCache`. T = C, and `positions_T` = length, length + 1, ..."""
        block: Block = (k_TKH.transpose(1, 0, 2), v_TKH.transpose(1, 0, 2))
        mask_TC = positions_T[:, None] >= positions_T[None]
        row = [lambda index=index: self._gather(layer, index) for index in range(self.layout.num_blocks)]
        out = _attend(q_TNH, row, self.layout.block_size, self.num_blocks, self.length, block, mask_TC)
        return out, dataclasses.replace(self, fresh=(*self.fresh, block))

    def _gather(self, layer: int, block: int) -> Block:
        width = self.layout.pages_per_block
        indices = self.table_R[block * width : (block + 1) * width]

        def gather(pages_PKCH: jax.Array) -> jax.Array:
            _, K, _, H = pages_PKCH.shape
            gathered_RKCH = pages_PKCH.at[indices].get(mode="promise_in_bounds")
            return gathered_RKCH.transpose(1, 0, 2, 3).reshape(K, self.layout.block_size, H)

        return gather(self.pages.keys[layer]), gather(self.pages.values[layer])


def write_rows(
    pages: PagedKVCache,
    tables_LR: jax.Array,
    starts_L: jax.Array,
    counts_L: jax.Array,
    fresh: tuple[Block, ...],
    pages_touched: int,
) -> PagedKVCache:
    """Writes each lane's `counts_L` new positions, from position `starts_L` on, into one shard's pages.

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
        return pages_PKCH.at[targets_LW.reshape(-1)].set(merged, mode="promise_in_bounds")

    keys = tuple(write(old, k) for old, (k, _) in zip(pages.keys, fresh, strict=True))
    values = tuple(write(old, v) for old, (_, v) in zip(pages.values, fresh, strict=True))
    return PagedKVCache(keys, values)


def copy_pages(pages: PagedKVCache, sources: jax.Array, targets: jax.Array) -> PagedKVCache:
    """Copies pages within one shard, in the order given (a page may be a target and later a source); int32 `[...]`
    each.

    Pairs of the trash page with itself do nothing.
    """

    def copy(step: jax.Array, pages: PagedKVCache) -> PagedKVCache:
        def move(pages_PKCH: jax.Array) -> jax.Array:
            page = jax.lax.dynamic_index_in_dim(pages_PKCH, sources[step], keepdims=True)
            return jax.lax.dynamic_update_index_in_dim(pages_PKCH, page, targets[step], axis=0)

        return jax.tree.map(move, pages)

    return jax.lax.fori_loop(0, sources.shape[0], copy, pages)
