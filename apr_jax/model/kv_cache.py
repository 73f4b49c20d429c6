"""The paged KV cache and what a forward sees of it.

Letters as in `llama.py`; besides, S positions of one block of a row, C new positions of one chunk or one page,
E entries.

A *row* is one thread's cache in order of position, cut into blocks of S positions. Attention treats each block on its
own and merges the parts (online softmax, Milakov and Gimelshein 2018), then adds the new positions. A block that is
wholly masked changes no bit of the result. So a thread's result does not depend on its neighbours, and blocks that a
thread doesn't need are skipped.

Prefill gathers a *span*, some blocks, from the pages where it uses it. Decode uses every block at every step: it copies
them once per chunk, and only those that hold something, into one list of *entries* over all lanes (`PackedRows`). What
a step reads is then the sum of the threads' lengths, not the number of lanes times the longest of them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.model.paged_attention import PLAIN, HeadTile

BLOCK = 64  # positions, rounded up to whole pages
MAX_SPANS = 8  # of a row; each is a branch in the compiled prefill
MERGED_BLOCKS = 8  # blocks of a lane that are merged at once
LARGE_CHUNK = 32  # entries of packed rows, enough to amortise a chunk's overhead
MAX_LARGE_CHUNKS = 16  # each is a branch in the compiled decode step
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
    values: tuple[jax.Array, ...]  # for a TPU's kernel heads are tiled, [shards, P, J, page, W] (`HeadTile`)

    @classmethod
    def create(
        cls, config: ModelConfig, num_shards: int, pages_per_shard: int, page_size: int, tile: HeadTile = PLAIN
    ) -> Self:
        """An empty cache. Only shapes matter: what was never written is never read."""
        groups, width = config.num_kv_heads // tile.heads, tile.heads * config.head_dim + tile.padding
        shape = (num_shards, pages_per_shard, groups, page_size, width)
        keys, values = (tuple(_zeros(shape, config) for _ in range(config.num_layers)) for _ in range(2))
        return cls(keys, values)

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[-2]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a row of `max_seq_len` positions is cut into blocks of whole pages, and these are counted into spans."""

    num_spans: int
    blocks_per_span: int
    pages_per_block: int
    page_size: int
    tile: HeadTile = PLAIN

    @classmethod
    def of(cls, max_seq_len: int, page_size: int, tile: HeadTile = PLAIN) -> Self:
        pages_per_block = -(-min(BLOCK, max_seq_len) // page_size)
        num_blocks = -(-max_seq_len // (pages_per_block * page_size))
        blocks_per_span = -(-num_blocks // MAX_SPANS)
        return cls(-(-num_blocks // blocks_per_span), blocks_per_span, pages_per_block, page_size, tile)

    @property
    def num_blocks(self) -> int:
        return self.num_spans * self.blocks_per_span

    @property
    def block_size(self) -> int:
        return self.pages_per_block * self.page_size

    @property
    def span_size(self) -> int:
        return self.blocks_per_span * self.block_size

    @property
    def pages_per_row(self) -> int:
        return self.num_blocks * self.pages_per_block

    def blocks_for(self, length: jax.Array) -> jax.Array:
        """Blocks that hold `length` positions."""
        return (length + self.block_size - 1) // self.block_size

    def spans_for(self, length: jax.Array) -> jax.Array:
        """Spans that hold `length` positions."""
        return (length + self.span_size - 1) // self.span_size


Chunks = tuple[Block, ...]  # chunks of entries, each keys and values [entries of a chunk, K, S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowBuffers:
    """Room for the packed rows, kept between chunks of decoding: fresh memory would have to be faulted in."""

    layers: tuple[Chunks, ...]  # arrays [shards, entries of a chunk, K, S, H]

    @classmethod
    def create(cls, config: ModelConfig, num_shards: int, layout: RowLayout, max_entries: int, lanes: int) -> Self:
        """Room for `max_entries` blocks of `lanes` lanes a shard, in chunks of `chunk_sizes`."""
        rest = (config.num_kv_heads, layout.block_size, config.head_dim)
        shapes = [(num_shards, size, *rest) for size in chunk_sizes(max_entries, lanes)]
        return cls(tuple(tuple((_zeros(shape, config),) * 2 for shape in shapes) for _ in range(config.num_layers)))

    @property
    def chunks(self) -> list[slice]:
        """Which entries each chunk holds."""
        sizes = [keys.shape[-4] for keys, _ in self.layers[0]]
        return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def chunk_sizes(max_entries: int, lanes: int) -> list[int]:
    """How many entries each chunk of a list holds.

    A chunk is read whole or not at all. The first has an entry for each lane, each further one as many as those before
    it together, up to a limit: so at most half of what is read is empty where the list is short, and one chunk's worth
    where it is long.
    """
    limit = max(LARGE_CHUNK, -(-max_entries // MAX_LARGE_CHUNKS))
    sizes: list[int] = []
    while (total := sum(sizes)) < max_entries:
        sizes.append(min(max(total, lanes, 2), limit, max_entries - total))
    return sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """The blocks that the lanes' rows fill, copied from the pages: entry after entry, chunk after chunk.

    Entries are ordered by lane, then by place in the row. What lies behind the last entry has no meaning.
    """

    lane_E: jax.Array  # int32: whose block it is
    length_E: jax.Array  # int32: positions that it holds, the rest is masked
    num_entries: jax.Array  # int32 scalar
    buffers: RowBuffers  # without the shard axis


def pack_rows(
    buffers: RowBuffers, pages: PagedKVCache, tables_LR: jax.Array, lengths_L: jax.Array, layout: RowLayout
) -> tuple[PackedRows, jax.Array]:
    """Copies the first `lengths_L` positions of each lane into the buffers (one shard, no shard axis).

    What does not fit the buffers is lost; the scheduler sees to it that all does.

    Returns:
        The rows, and int32 `[L, blocks of a row]`: which entries are a lane's; E where it has no further block.
    """
    num_lanes, B, W = len(lengths_L), layout.num_blocks, layout.pages_per_block
    E = buffers.chunks[-1].stop
    filled_L = layout.blocks_for(lengths_L)
    ends_L = jnp.cumsum(filled_L)
    num_entries = ends_L[-1]
    entry_E = jnp.arange(E)
    lane_E = jnp.minimum(jnp.searchsorted(ends_L, entry_E, side="right"), num_lanes - 1).astype(jnp.int32)
    block_E = jnp.clip(entry_E - (ends_L - filled_L)[lane_E], 0, B - 1)
    live_E = entry_E < num_entries
    length_E = jnp.where(live_E, jnp.clip(lengths_L[lane_E] - block_E * layout.block_size, 0, layout.block_size), 0)
    tables_EW = tables_LR.reshape(num_lanes, B, W)[lane_E, block_E]
    block_B = jnp.arange(B)[None]
    own_LB = jnp.where(block_B < filled_L[:, None], (ends_L - filled_L)[:, None] + block_B, E).astype(jnp.int32)

    def fill(chunk: int, part_of_E: slice) -> list[Block]:
        """The layers' chunk with its entries' pages, one page after the other."""

        def copy(index: jax.Array, blocks: list[Block]) -> list[Block]:
            entry, part = index // W, index % W
            page = tables_EW[part_of_E.start + entry, part]
            target = (entry, 0, part * layout.page_size, 0)

            def move(pages_PKCH: jax.Array, block_EKSH: jax.Array) -> jax.Array:
                page_1KCH = jax.lax.dynamic_index_in_dim(pages_PKCH, page, keepdims=True)
                return jax.lax.dynamic_update_slice(block_EKSH, page_1KCH, target)

            sources = zip(pages.keys, pages.values, strict=True)
            return [(move(k, old_k), move(v, old_v)) for (k, v), (old_k, old_v) in zip(sources, blocks, strict=True)]

        count = jnp.clip(num_entries - part_of_E.start, 0, part_of_E.stop - part_of_E.start) * W
        return jax.lax.fori_loop(0, count, copy, [layer[chunk] for layer in buffers.layers])

    chunks = [fill(chunk, part_of_E) for chunk, part_of_E in enumerate(buffers.chunks)]
    layers = tuple(tuple(chunk[layer] for chunk in chunks) for layer in range(len(buffers.layers)))
    return PackedRows(lane_E, length_E, num_entries, RowBuffers(layers)), own_LB


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
    carry = empty_part((K, G * T), H)
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


def _attend_entries(q_LKGH: jax.Array, own_LB: jax.Array, rows: PackedRows, layer: int) -> Carry:
    """Every lane's online softmax over its own entries: maximum and sum `[L, K, G]`, weighted values `[L, K, G, H]`."""
    parts = []
    for part, (k_EKSH, v_EKSH) in zip(rows.buffers.chunks, rows.buffers.layers[layer], strict=True):
        size, K, S, H = k_EKSH.shape
        G = q_LKGH.shape[2]

        def attend(k_EKSH: jax.Array = k_EKSH, v_EKSH: jax.Array = v_EKSH, part: slice = part, S: int = S) -> Carry:
            q_EKGH = q_LKGH.at[rows.lane_E[part]].get(mode="promise_in_bounds")
            mask_E11S = (jnp.arange(S)[None] < rows.length_E[part][:, None])[:, None, None]
            return softmax_parts(q_EKGH, k_EKSH, v_EKSH, mask_E11S)

        nothing = empty_part((size, K, G), H)
        parts.append(jax.lax.cond(part.start < rows.num_entries, attend, lambda nothing=nothing: nothing))
    tops, sums, outs = (
        jnp.concatenate([*each, empty])
        for each, empty in zip(
            zip(*parts, strict=True), empty_part((1, *parts[0][0].shape[1:]), parts[0][2].shape[-1]), strict=True
        )
    )
    merged = _merge_parts(own_LB[:, :MERGED_BLOCKS], (tops, sums, outs))
    for first in range(MERGED_BLOCKS, own_LB.shape[1], MERGED_BLOCKS):
        own_LM = own_LB[:, first : first + MERGED_BLOCKS]

        def further(merged: Carry, own_LM: jax.Array = own_LM) -> Carry:
            return merge_two(merged, _merge_parts(own_LM, (tops, sums, outs)))

        needed = jnp.any(own_LM[:, 0] < len(tops) - 1)
        merged = jax.lax.cond(needed, further, lambda merged: merged, merged)
    return merged


def _merge_parts(own_LM: jax.Array, parts: Carry) -> Carry:
    """For each lane, the softmax over those of the parts `[E, ...]` that are its own."""
    top_LMKG, sum_LMKG, out_LMKGH = (x.at[own_LM].get(mode="promise_in_bounds") for x in parts)
    top_LKG = jnp.max(top_LMKG, axis=1)
    scale_LMKG = jnp.exp(top_LMKG - top_LKG[:, None])
    # One after the other: XLA's CPU backend runs a reduction that it fuses with the output projection at a tenth of the
    # speed.
    scales = [scale_LMKG[:, block] for block in range(own_LM.shape[1])]
    sum_LKG = functools.reduce(jnp.add, [sum_LMKG[:, block] * scale for block, scale in enumerate(scales)])
    weighted = [out_LMKGH[:, block] * scale[..., None] for block, scale in enumerate(scales)]
    return top_LKG, sum_LKG, functools.reduce(jnp.add, weighted)


def merge_two(first: Carry, second: Carry) -> Carry:
    """The softmax over both parts; a part without positions changes no bit of the other."""
    top = jnp.maximum(first[0], second[0])
    scales = [jnp.exp(part[0] - top) for part in (first, second)]
    total = first[1] * scales[0] + second[1] * scales[1]
    return top, total, first[2] * scales[0][..., None] + second[2] * scales[1][..., None]


def softmax_parts(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> Carry:
    """Softmax of `q [..., K, G, H]` over one block `[..., K, S, H]`, not yet normalised.

    Returns maximum and sum `[..., K, G]`, weighted values `[..., K, G, H]`.
    """
    scores = jnp.einsum("...KGH,...KSH->...KGS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, MASKED_SCORE)
    top = jnp.max(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0.0)
    values = jnp.einsum("...KGS,...KSH->...KGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return top, jnp.sum(weights, axis=-1), values


def empty_part(shape: tuple[int, ...], head_dim: int) -> Carry:
    """The part that a block without positions contributes."""
    return (
        jnp.full(shape, MASKED_SCORE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def _attend_row(q_KGH: jax.Array, own_B: jax.Array, rows: PackedRows, layer: int) -> Carry:
    """One thread's online softmax over its row.

    Lifted over lanes it does not become one such computation a lane: all lanes together go through the list of entries.
    """

    @jax.custom_batching.custom_vmap
    def attend(q_KGH: jax.Array, own_B: jax.Array, rows: PackedRows) -> Carry:
        return jax.tree.map(lambda x: x[0], _attend_entries(q_KGH[None], own_B[None], rows, layer))

    @attend.def_vmap
    def lifted(axis_size: int, in_batched: Any, q: jax.Array, own: jax.Array, rows: PackedRows) -> tuple[Carry, Any]:
        q_lifted, own_lifted, rows_lifted = in_batched
        assert q_lifted
        assert own_lifted
        assert not any(jax.tree.leaves(rows_lifted))
        return _attend_entries(q, own, rows, layer), (True, True, True)

    return attend(q_KGH, own_B, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeView:
    """One thread's cache inside a decode chunk: its row as it was before the chunk, and what the chunk has added.

    New keys and values stand at the chunk's step, which is the same number for every lane, so that lifting over lanes
    keeps the write a slice update.
    """

    rows: PackedRows  # of all lanes (the same for all)
    own_B: jax.Array  # int32, the thread's entries in it
    fresh: tuple[Block, ...]  # per layer, keys and values [K, C, H]; C = steps of a chunk
    length: jax.Array  # int32 scalar, positions in the row
    step: jax.Array  # int32 scalar, steps of the chunk before this one (the same for all lanes)

    @property
    def carried(self) -> tuple[Block, ...]:
        """What a step hands to the next one."""
        return self.fresh

    def attend(
        self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, Self]:
        """See `llama.KVCache`. T = 1, and `positions_T` = length + step."""
        del positions_T
        k_KCH, v_KCH = (
            jax.lax.dynamic_update_slice_in_dim(old, fresh.transpose(1, 0, 2), self.step, axis=1)
            for old, fresh in zip(self.fresh[layer], (k_TKH, v_TKH), strict=True)
        )
        K, C, H = k_KCH.shape
        q_KGH = (q_TNH / math.sqrt(H)).astype(q_TNH.dtype).reshape(K, -1, H)
        row = _attend_row(q_KGH, self.own_B, self.rows, layer)
        mask_11C = (jnp.arange(C) <= self.step)[None, None]
        _, sum_KG, out_KGH = merge_two(row, softmax_parts(q_KGH, k_KCH, v_KCH, mask_11C))
        out_TNH = (out_KGH / sum_KG[..., None]).reshape(q_TNH.shape).astype(q_TNH.dtype)
        fresh = (*self.fresh[:layer], (k_KCH, v_KCH), *self.fresh[layer + 1 :])
        return out_TNH, dataclasses.replace(self, fresh=fresh)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillView:
    """One thread's cache in a prefill call: all pages and its table, and the new positions of one page."""

    pages: PagedKVCache  # one shard's (the same for all lanes)
    table_R: jax.Array  # int32, the row's pages; entries without one name the trash page
    fresh: tuple[Block, ...]  # per layer computed so far, keys and values [K, C, H]
    length: jax.Array  # int32 scalar, positions in the row
    num_spans: jax.Array  # int32 scalar, spans that any lane needs (the same for all lanes)
    layout: RowLayout = dataclasses.field(metadata={"static": True})

    def attend(
        self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, Self]:
        """See `llama.KVCache`. T = C, and `positions_T` = length, length + 1, ..."""
        block: Block = (k_TKH.transpose(1, 0, 2), v_TKH.transpose(1, 0, 2))
        mask_TC = positions_T[:, None] >= positions_T[None]
        row = [lambda index=index: self._gather(layer, index) for index in range(self.layout.num_spans)]
        out = _attend(q_TNH, row, self.layout.span_size, self.num_spans, self.length, block, mask_TC)
        return out, dataclasses.replace(self, fresh=(*self.fresh, block))

    def _gather(self, layer: int, span: int) -> Block:
        width = self.layout.blocks_per_span * self.layout.pages_per_block
        indices = self.table_R[span * width : (span + 1) * width]

        def gather(pages_PKCH: jax.Array) -> jax.Array:
            gathered_RKCH = self.layout.tile.unpack(pages_PKCH.at[indices].get(mode="promise_in_bounds"))
            _, K, _, H = gathered_RKCH.shape
            return gathered_RKCH.transpose(1, 0, 2, 3).reshape(K, self.layout.span_size, H)

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
        # Apart from the update: where XLA's GPU compiler fuses the two, it copies all pages.
        merged = jax.lax.optimization_barrier(merged)  # type: ignore[no-untyped-call]
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
