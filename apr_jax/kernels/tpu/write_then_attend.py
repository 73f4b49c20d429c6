"""A Pallas kernel for TPUs that writes new keys and values to their pages and attends to the pages in place.

Pages are `[P, C, W]`: all heads of a position lie side by side in a row of W elements, so a copy from HBM brings whole
pages, which are contiguous. Queries of KG heads are rows of one matrix that is zero where the other heads' keys lie. So
one product gives the scores of KG heads, and one more the weighted values, of which each row keeps its own head's
columns. The MXU loads keys and values as its weights in any case: the zeros cost nothing.

Letters besides those of `model/paged_attention.py`: Q query positions of a lane, G query heads of a key/value head,
S positions of a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apr_jax.model.online_softmax import MASKED_SCORE, Block

div, rem = jax.lax.div, jax.lax.rem  # of numbers that are not negative

LANES = 128  # columns of a vector register
UNIT = 16  # rows of a tile of bfloat16; pages are whole units
_BLOCK, _BLOCK_BYTES = 512, 1 << 20  # positions, and bytes of their keys, that are attended to at once
_SLOTS = 4  # blocks in flight or at hand
_STAGES = 16  # units in flight as positions are written
_TABLE_BYTES = 256 * 1024  # of a call's page table: it lies in scalar memory (1 MiB on v5e)
_ROW_BYTES = 2 << 20  # of a call's queries, which lie in vector memory, as keys, values and outputs do
_ROWS = 16  # rows of a product at least, where there are so many


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The static sizes of a call."""

    page: int  # C
    width: int  # W
    queries: int  # Q
    groups: int  # G
    head_dim: int  # H
    row: int  # R
    block: int  # S, whole pages

    @property
    def unit(self) -> int:
        """Return U, the rows that a lane rewrites: 8 are the least that a copy takes."""
        return 8 if self.queries == 1 else UNIT

    @property
    def heads_at_once(self) -> int:
        """Return KG, the key/value heads of one product: whole vector registers, and rows enough for a product."""
        heads = self.width // self.head_dim
        fits = [k for k in range(1, heads) if heads % k == 0 and k * self.head_dim % LANES == 0]
        return next((k for k in fits if k * self.groups * self.queries >= _ROWS), heads)


def write_then_attend(
    q_LQNH: jax.Array,
    k_LQKH: jax.Array,
    v_LQKH: jax.Array,
    pages: Block,
    starts_L: jax.Array,
    counts_L: jax.Array,
    tables_LR: jax.Array,
) -> tuple[jax.Array, Block]:
    """Write all lanes' new positions to the pages, then attend from each to its row up to itself.

    Args:
        q_LQNH: scaled queries. Q is 1 or UNIT.
        k_LQKH, v_LQKH: new keys and values. Where Q is UNIT, place q stands for the q-th position of the unit in which
            a lane's positions lie.
        pages: of keys and of values `[P, 1, C, W]`, the K heads side by side, then padding.
        starts_L: int32, each lane's first new position.
        counts_L: int32, its new positions, which end in the unit where they start; 0 writes nothing.
        tables_LR: int32, the pages of each row in order.

    Returns:
        `[L, Q, N, H]`, zeros for lanes that have nothing new, and the pages.
    """
    (L, Q, N, H), K, (P, _, C, W) = q_LQNH.shape, k_LQKH.shape[2], pages[0].shape
    G, R, dtype = N // K, tables_LR.shape[1], pages[0].dtype
    block = max(1, min(_BLOCK_BYTES // (C * W * dtype.itemsize), _BLOCK // C, R))  # pages
    sizes = _Sizes(C, W, Q, G, H, R, C * block)
    given = jnp.float32 if Q == 1 else dtype  # single rows of packed elements cannot be addressed

    def flat(x_LQGKH: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(x_LQGKH, 2, 0).reshape(-1, L * Q, K * H).astype(given)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, W - K * H))) if W > K * H else rows

    q = flat(jnp.swapaxes(q_LQNH.reshape(L, Q, K, G, H), 2, 3))
    k, v = (flat(x[:, :, None])[0] for x in (k_LQKH, v_LQKH))
    k_pages, v_pages = (x.reshape(P, C, W) for x in pages)
    most = max(1, min(_TABLE_BYTES // (4 * R), _ROW_BYTES // (Q * W * q.dtype.itemsize)))  # lanes of a call
    outs = []
    for first in range(0, L, most):
        lanes, rows = slice(first, first + most), slice(first * Q, (first + most) * Q)
        places = starts_L[lanes], counts_L[lanes], tables_LR[lanes]
        out, k_pages, v_pages = _call(sizes, q[:, rows], k[rows], v[rows], k_pages, v_pages, *places)
        outs.append(out)
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
    out_LQGKH = jnp.moveaxis(out[..., : K * H].reshape(G, L, Q, K, H), 0, 2)
    out_LQNH = jnp.swapaxes(out_LQGKH, 2, 3).reshape(q_LQNH.shape).astype(q_LQNH.dtype)
    return out_LQNH, (k_pages.reshape(pages[0].shape), v_pages.reshape(pages[1].shape))


def _call(
    sizes: _Sizes,
    q_GRW: jax.Array,
    k_RW: jax.Array,
    v_RW: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    starts_L: jax.Array,
    counts_L: jax.Array,
    tables_LR: jax.Array,
) -> list[jax.Array]:
    lanes = counts_L.shape[0]
    seen_L = jnp.where(counts_L > 0, starts_L + counts_L, 0)
    blocks_L = -(-seen_L // sizes.block)
    ends_L = jnp.cumsum(blocks_L)
    most = lanes * -(-sizes.row * sizes.page // sizes.block)
    lane_of = jnp.sum((ends_L[None] <= jnp.arange(most)[:, None]).astype(jnp.int32), axis=1)  # of each item of work
    scalars = (starts_L, counts_L, seen_L, ends_L - blocks_L, ends_L[-1:], lane_of, tables_LR.reshape(-1))
    whole, hbm = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)
    dtype, unit = k_pages.dtype, sizes.unit
    parts = (sizes.width // sizes.head_dim // sizes.heads_at_once) or 1
    rows = sizes.groups * sizes.heads_at_once * sizes.queries
    wide = sizes.width if parts == 1 else sizes.heads_at_once * sizes.head_dim
    scratch = (
        *(pltpu.VMEM((_SLOTS, sizes.block, sizes.width), dtype) for _ in range(2)),
        *(pltpu.VMEM((_STAGES, unit, sizes.width), dtype) for _ in range(2)),
        *(pltpu.VMEM((parts, rows, LANES), jnp.float32) for _ in range(2)),
        pltpu.VMEM((parts, rows, wide), jnp.float32),
        pltpu.SemaphoreType.DMA((_SLOTS,)),
        pltpu.SemaphoreType.DMA((2, _STAGES)),
    )
    n, shape = len(scalars), cast(Callable[..., Any], jax.ShapeDtypeStruct)
    return list(
        pl.pallas_call(
            functools.partial(_kernel, sizes),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=n,
                grid=(1,),
                in_specs=[whole, whole, whole, hbm, hbm],
                out_specs=[whole, hbm, hbm],
                scratch_shapes=scratch,
            ),
            out_shape=[shape(x.shape, x.dtype) for x in (q_GRW, k_pages, v_pages)],
            input_output_aliases={n + 3: 1, n + 4: 2},
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=48 << 20),
            name="write_then_attend",
        )(*scalars, q_GRW, k_RW, v_RW, k_pages, v_pages)
    )


def _kernel(
    sizes: _Sizes,
    starts: Any,
    counts: Any,
    seen: Any,
    first_items: Any,
    total: Any,
    lane_of: Any,
    tables: Any,
    q: Any,
    k_new: Any,
    v_new: Any,
    k_given: Any,
    v_given: Any,
    out: Any,
    k_pages: Any,
    v_pages: Any,
    k_blocks: Any,
    v_blocks: Any,
    k_stages: Any,
    v_stages: Any,
    tops: Any,
    sums: Any,
    accs: Any,
    block_sems: Any,
    stage_sems: Any,
) -> None:
    del k_given, v_given  # the outputs are the same memory
    out[...] = jnp.zeros_like(out)
    v_blocks[...] = jnp.zeros_like(v_blocks)  # what no copy has filled is multiplied by 0, and must be finite
    pages, blocks = (k_pages, v_pages), (k_blocks, v_blocks)
    writer = _Writer(sizes, starts, counts, tables, (k_new, v_new), pages, (k_stages, v_stages), stage_sems)
    reader = _Reader(sizes, seen, first_items, lane_of, tables, pages, blocks, block_sems)
    if sizes.queries > 1:
        writer.write_all()
    items = total[0]

    def prefetch(item: Any) -> None:
        pl.when(item < items)(lambda: reader.each(item, lambda copy: copy.start()))

    for ahead in range(_SLOTS - 1):
        prefetch(jnp.int32(ahead))

    def attend(item: Any, written: Any) -> Any:
        prefetch(item + _SLOTS - 1)
        reader.each(item, lambda copy: copy.wait())
        lane, slot = lane_of[item], rem(item, _SLOTS)
        block = item - first_items[lane]
        block_refs = k_blocks.at[slot], v_blocks.at[slot]
        last = (block + 1) * sizes.block >= seen[lane]
        if sizes.queries == 1:
            written = writer.write_from(block_refs, lane, last, written)
        base = starts[lane] if sizes.queries == 1 else div(starts[lane], UNIT) * UNIT
        _attend_block(sizes, lane, block, base, last, q, block_refs, (tops, sums, accs), out)
        return written

    writer.finish(jax.lax.fori_loop(0, items, attend, jnp.int32(0)))


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A writer of new positions, a unit of a page at a time, since a copy takes no less: read, changed, written back.

    A lane of one position is written once its last block is there. Lanes of several may be neighbours in a row, so that
    all are written before any attends.
    """

    sizes: _Sizes
    starts: Any
    counts: Any
    tables: Any
    new: tuple[Any, Any]
    pages: tuple[Any, Any]
    stages: tuple[Any, Any]
    sems: Any

    def write_from(self, block: tuple[Any, Any], lane: Any, last: Any, written: Any) -> Any:
        """Write a lane's new position to its `block`, if it is the last one, and from there to its page.

        Returns the number of units written so far, of which `written` were before.
        """
        slot = rem(written, _STAGES)
        at = self._unit_in(self.sizes.block, lane)

        @pl.when(last)
        def _() -> None:
            pl.when(written >= _STAGES)(lambda: self._each(1, lane, slot, lambda copy: copy.wait()))
            for part, (held, stages) in enumerate(zip(block, self.stages, strict=True)):
                held[at, :] = stages[slot] = self._changed(part, lane, held[at, :])
            self._each(1, lane, slot, lambda copy: copy.start())

        return written + last.astype(jnp.int32)

    def write_all(self) -> None:
        """Write all lanes, half of the stages being read and the other half written."""
        lanes, ahead = self.counts.shape[0], _STAGES // 2

        def when(lane: Any, do: Callable[[Any, Any], None]) -> None:
            there = (lane >= 0) & (lane < lanes)
            there &= self.counts[jnp.minimum(jnp.maximum(lane, 0), lanes - 1)] > 0
            pl.when(there)(lambda: do(lane, rem(lane, _STAGES)))

        def change(lane: Any, slot: Any) -> None:
            self._each(0, lane, slot, lambda copy: copy.wait())
            for part, stages in enumerate(self.stages):
                stages[slot] = self._changed(part, lane, stages[slot])
            self._each(1, lane, slot, lambda copy: copy.start())

        def visit(step: Any, carry: int) -> int:
            when(step - _STAGES, lambda lane, slot: self._each(1, lane, slot, lambda copy: copy.wait()))
            when(step, lambda lane, slot: self._each(0, lane, slot, lambda copy: copy.start()))
            when(step - ahead, change)
            return carry

        jax.lax.fori_loop(0, lanes + _STAGES, visit, 0)

    def finish(self, written: Any) -> None:
        """Wait for the last units that `write_from` wrote."""

        def wait(slot: Any, carry: int) -> int:
            self._each(1, 0, slot, lambda copy: copy.wait())
            return carry

        jax.lax.fori_loop(0, jnp.minimum(written, _STAGES), wait, 0)

    def _each(self, way: int, lane: Any, slot: Any, do: Callable[[Any], None]) -> None:
        """Do it to the copies of a lane's unit: way 0 from the pages, 1 to them."""
        sizes = self.sizes
        page = self.tables[lane * sizes.row + div(self.starts[lane], sizes.page)]
        at = self._unit_in(sizes.page, lane)
        for pages, stages in zip(self.pages, self.stages, strict=True):
            ends = pages.at[page, at], stages.at[slot]
            do(pltpu.make_async_copy(*(ends if way == 0 else ends[::-1]), self.sems.at[way, slot]))

    def _unit_in(self, size: int, lane: Any) -> Any:
        """Return the place of a lane's unit in a page or block of `size` positions."""
        unit = self.sizes.unit
        return pl.ds(pl.multiple_of(div(rem(self.starts[lane], size), unit) * unit, unit), unit)

    def _changed(self, part: int, lane: Any, old: jax.Array) -> jax.Array:
        """Return a unit of keys (part 0) or values with a lane's new positions in it."""
        unit, Q, new = self.sizes.unit, self.sizes.queries, self.new[part]
        first = rem(self.starts[lane], unit)
        place = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
        fresh = (place >= first) & (place < first + self.counts[lane])
        rows = new[pl.ds(lane if Q == 1 else pl.multiple_of(lane * Q, Q), Q), :].astype(jnp.float32)
        return jnp.where(fresh, jnp.broadcast_to(rows, old.shape), old.astype(jnp.float32)).astype(old.dtype)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A reader of blocks of rows: whole pages, and of a lane's last page the units that hold positions."""

    sizes: _Sizes
    seen: Any
    first_items: Any
    lane_of: Any
    tables: Any
    pages: tuple[Any, Any]
    blocks: tuple[Any, Any]
    sems: Any

    def each(self, item: Any, do: Callable[[Any], None]) -> None:
        """Do it to every copy of a block: the item-th piece of work."""
        sizes, lane, slot = self.sizes, self.lane_of[item], rem(item, _SLOTS)
        first = (item - self.first_items[lane]) * sizes.block
        units = jnp.minimum(div(self.seen[lane] - first + UNIT - 1, UNIT), sizes.block // UNIT)
        per_page = sizes.page // UNIT
        table = lane * sizes.row + div(first, sizes.page)

        def copy(page: Any, source: Any, target: Any) -> None:
            for pages, blocks in zip(self.pages, self.blocks, strict=True):
                do(
                    pltpu.make_async_copy(
                        pages.at[self.tables[table + page], source], blocks.at[slot, target], self.sems.at[slot]
                    )
                )

        def whole(page: Any, carry: int) -> int:
            at = pl.multiple_of(page * sizes.page, sizes.page)
            copy(page, pl.ds(0, sizes.page), pl.ds(at, sizes.page))
            return carry

        def part(unit: Any, carry: int) -> int:
            at = pl.multiple_of(unit * UNIT, UNIT)
            copy(div(unit, per_page), pl.ds(pl.multiple_of(rem(unit, per_page) * UNIT, UNIT), UNIT), pl.ds(at, UNIT))
            return carry

        pages = div(units, per_page)
        jax.lax.fori_loop(0, pages, whole, 0)
        jax.lax.fori_loop(pages * per_page, units, part, 0)


def _attend_block(
    sizes: _Sizes, lane: Any, block: Any, base: Any, last: Any, q: Any, kv: tuple[Any, Any], parts: Any, out: Any
) -> None:
    """Merge a block into the softmax of all heads of a lane, and write the outputs after the last one."""
    Q, G, KG, H, S = sizes.queries, sizes.groups, sizes.heads_at_once, sizes.head_dim, sizes.block
    tops, sums, accs = parts
    num, rows, wide = accs.shape
    position = block * S + jax.lax.broadcasted_iota(jnp.int32, (rows, S), 1)
    visible = position <= base + rem(jax.lax.broadcasted_iota(jnp.int32, (rows, S), 0), Q)
    row = jax.lax.broadcasted_iota(jnp.int32, (rows // G, wide), 0)
    own = div(row, Q) == div(jax.lax.broadcasted_iota(jnp.int32, (rows // G, wide), 1), H)
    at = pl.ds(lane if Q == 1 else pl.multiple_of(lane * Q, Q), Q)
    for part in range(num):
        columns = slice(part * wide, (part + 1) * wide)
        of_groups = [q[g, at, columns].astype(jnp.float32) for g in range(G)]
        spread = [jnp.where(own, _repeat(x, KG), 0.0) for x in of_groups]
        q_block = (spread[0] if G == 1 else jnp.concatenate(spread)).astype(kv[0].dtype)
        scores = jax.lax.dot_general(
            q_block, kv[0][:, columns], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores = jnp.where(visible, scores, MASKED_SCORE)
        new = block == 0
        old_top = jnp.where(new, MASKED_SCORE, tops[part])
        top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
        scale = jnp.exp(old_top - top)
        weights = jnp.exp(scores - top[:, :1])
        total = jnp.where(new, 0.0, sums[part]) * scale + jnp.sum(weights, axis=1, keepdims=True)
        values = jnp.dot(weights.astype(kv[1].dtype), kv[1][:, columns], preferred_element_type=jnp.float32)
        acc = jnp.where(new, 0.0, accs[part]) * scale[:, :1] + values
        tops[part], sums[part], accs[part] = top, total, acc

    @pl.when(last)
    def _() -> None:
        for part in range(num):
            columns = slice(part * wide, (part + 1) * wide)
            found = accs[part] / sums[part][:, :1]
            for g in range(G):
                mine = jnp.where(own, found[g * KG * Q : (g + 1) * KG * Q], 0.0)
                merged = jnp.sum(mine.reshape(KG, Q, wide), axis=0) if Q > 1 else jnp.sum(mine, axis=0, keepdims=True)
                out[g, at, columns] = merged.astype(out.dtype)


def _repeat(x_QW: jax.Array, times: int) -> jax.Array:
    Q, W = x_QW.shape
    return jnp.broadcast_to(x_QW, (times, W)) if Q == 1 else jnp.concatenate([x_QW] * times)
