"""The cache of a decode chunk whose lanes are workers on shared caches, as one of `decode_cache.DecodeCache`.

Rows are gathered from the pages once a chunk, span by span; new positions go to a buffer that all lanes see, and to the
pages at the end. It is a program of its own (`Steps.decode_groups`), which an engine without groups never compiles.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.engine.lanes import GroupLanes
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.online_softmax import Block
from apr_jax.model.paged_cache import PagedKVCache, pages_per_span, write_rows
from apr_jax.model.rope import Frequencies, rope_angles
from apr_jax.model.views.shared import SharedWorkers

Carried = tuple[tuple[Block, ...], jax.Array]


@dataclasses.dataclass(frozen=True)
class GroupCache:
    """A `DecodeCache` of groups: lane `a * workers + w` is worker w of group a."""

    tile: HeadTile
    pages: PagedKVCache
    tables_LR: jax.Array
    first: SharedWorkers  # the view before the chunk's first step

    @classmethod
    def open(
        cls, config: ModelConfig, tile: HeadTile, pages: PagedKVCache, groups: GroupLanes, *, steps: int, workers: int
    ) -> Self:
        """Open the cache of a chunk of up to `steps` tokens a lane (one shard, no shard axis)."""
        tables_LR, lengths_L, frequencies = groups.lanes.tables, groups.lanes.length, Frequencies.of(config)
        span = pages_per_span(pages.page_size)
        num_spans = (jnp.max(lengths_L) + span * pages.page_size - 1) // (span * pages.page_size)

        def gather(layer_pages: jax.Array) -> jax.Array:
            return _gather(layer_pages, tile, tables_LR, num_spans)

        rows = tuple((gather(k), gather(v)) for k, v in zip(pages.keys, pages.values, strict=True))
        _, L, K, _, H = rows[0][0].shape
        zeros = jnp.zeros((L, K, steps, H), config.compute_dtype)
        first = SharedWorkers(
            rope=rope_angles(lengths_L, frequencies),
            rows=rows,
            num_spans=num_spans,
            fresh=tuple((zeros, zeros) for _ in rows),
            seen_L=jnp.zeros((L,), jnp.int32),
            lengths_L=lengths_L,
            prompts_L=groups.prompt,
            step=jnp.int32(0),
            workers=workers,
            frequencies=frequencies,
        )
        return cls(tile, pages, tables_LR, first)

    def start(self) -> Carried:
        return self.carried(self.first)

    def view(self, carried: Carried, step: jax.Array, live_L: jax.Array) -> SharedWorkers:
        fresh, seen_L = carried
        rope = rope_angles(self.first.lengths_L + step, self.first.frequencies)
        seen_L = seen_L + live_L.astype(jnp.int32)
        return dataclasses.replace(self.first, rope=rope, fresh=fresh, seen_L=seen_L, step=step)

    def carried(self, view: SharedWorkers) -> Carried:
        return view.fresh, view.seen_L

    def finish(self, carried: Carried, counts_L: jax.Array) -> PagedKVCache:
        steps = carried[0][0][0].shape[2]
        touched = -(-(steps - 1) // self.pages.page_size) + 1
        fresh = jax.tree.map(self.tile.pack, carried[0])
        return write_rows(self.pages, self.tables_LR, self.first.lengths_L, counts_L, fresh, touched)


def _gather(pages: jax.Array, tile: HeadTile, tables_LR: jax.Array, num_spans: jax.Array) -> jax.Array:
    """Gather one layer's rows `[spans, L, K, S, H]`; those that no lane fills are zeros."""
    B = pages_per_span(pages.shape[2])

    def gather(span: jax.Array) -> jax.Array:
        tables_LB = jax.lax.dynamic_slice_in_dim(tables_LR, span * B, B, axis=1)
        gathered_LBKCH = tile.unpack(pages.at[tables_LB].get(mode="promise_in_bounds"))
        L, _, K, C, H = gathered_LBKCH.shape
        return gathered_LBKCH.transpose(0, 2, 1, 3, 4).reshape(L, K, B * C, H)

    def fill(span: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(rows, gather(span), span, axis=0)

    shape = jax.eval_shape(gather, jnp.int32(0))
    return jax.lax.fori_loop(0, num_spans, fill, jnp.zeros((tables_LR.shape[1] // B, *shape.shape), shape.dtype))
