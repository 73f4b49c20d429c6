"""The cache of a decode chunk whose lanes are workers on shared caches, as one of `decode_cache.DecodeCache`.

Rows are gathered from the pages once a chunk, span by span; new positions go to a buffer that all lanes see, and to the
pages at the end. It is a program of its own (`Steps.decode_shared`), which an engine without groups never compiles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.engine.decode_cache import View
from apr_jax.model.kv_cache import Block, PagedKVCache, RowBuffers, RowLayout, write_rows
from apr_jax.model.shared_view import SharedView, Spans

Carried = tuple[tuple[Block, ...], jax.Array]


@dataclasses.dataclass(frozen=True)
class SharedCache:
    """Lane `a * workers + w` is worker w of group a."""

    pages: PagedKVCache
    layout: RowLayout
    rows: tuple[Spans, ...]
    num_spans: jax.Array
    tables_LR: jax.Array
    lengths_L: jax.Array
    prompts_L: jax.Array
    steps: int
    workers: int
    rope_theta: float
    carried_axis: int | None = None

    @classmethod
    def open(
        cls,
        pages: PagedKVCache,
        layout: RowLayout,
        tables_LR: jax.Array,
        lengths_L: jax.Array,
        prompts_L: jax.Array,
        *,
        steps: int,
        workers: int,
        rope_theta: float,
    ) -> "SharedCache":
        """The cache of a chunk of up to `steps` tokens a lane (one shard, no shard axis)."""
        num_spans = layout.spans_for(jnp.max(lengths_L))
        rows = tuple(_gather(k, v, layout, tables_LR, num_spans) for k, v in zip(pages.keys, pages.values, strict=True))
        return cls(pages, layout, rows, num_spans, tables_LR, lengths_L, prompts_L, steps, workers, rope_theta)

    @property
    def view_axes(self) -> Any:
        whole: Any = None
        return SharedView(whole, whole, whole, whole, whole, whole, 0, whole, self.workers, self.rope_theta)  # type: ignore[arg-type]

    def start(self) -> Carried:
        _, K, _, H = self.rows[0][0][0].shape
        L = len(self.lengths_L)
        zeros = jnp.zeros((L, K, self.steps, H), self.pages.keys[0].dtype)
        return tuple((zeros, zeros) for _ in self.pages.keys), jnp.zeros((L,), jnp.int32)

    def view(self, carried: Carried, step: jax.Array, live_L: jax.Array) -> View:
        fresh, seen_L = carried
        return SharedView(
            self.rows,
            self.num_spans,
            fresh,
            seen_L + live_L.astype(jnp.int32),
            self.lengths_L,
            self.prompts_L,
            self.lengths_L,
            step,
            self.workers,
            self.rope_theta,
        )

    def finish(self, carried: Carried, counts_L: jax.Array) -> tuple[PagedKVCache, RowBuffers]:
        touched = -(-(self.steps - 1) // self.pages.page_size) + 1
        fresh = jax.tree.map(self.layout.tile.pack, carried[0])
        pages = write_rows(self.pages, self.tables_LR, self.lengths_L, counts_L, fresh, touched)
        return pages, RowBuffers(())


def _gather(
    k_pages: jax.Array, v_pages: jax.Array, layout: RowLayout, tables_LR: jax.Array, num_spans: jax.Array
) -> Spans:
    """One layer's rows `[L, K, S, H]`, span by span; those that no lane fills are zeros."""
    width = layout.blocks_per_span * layout.pages_per_block
    L = len(tables_LR)

    def gather(pages: jax.Array, span: int) -> jax.Array:
        tables_LW = tables_LR[:, span * width : (span + 1) * width]
        gathered_LWKCH = layout.tile.unpack(pages.at[tables_LW].get(mode="promise_in_bounds"))
        _, _, K, _, H = gathered_LWKCH.shape
        return gathered_LWKCH.transpose(0, 2, 1, 3, 4).reshape(L, K, layout.span_size, H)

    def both(span: int) -> Block:
        return gather(k_pages, span), gather(v_pages, span)

    shapes = jax.eval_shape(lambda: both(0))
    return tuple(
        jax.lax.cond(
            span < num_spans,
            lambda span=span: both(span),
            lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in shapes),
        )
        for span in range(layout.num_spans)
    )
