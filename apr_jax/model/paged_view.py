"""One thread's cache in a decode step that works on the pages themselves: no gather before it, no write after it."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from apr_jax.model.kv_cache import PagedKVCache
from apr_jax.model.paged_attention import HeadTile, Impl, write_then_attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedView:
    """The pages of a shard, and where one thread's row lies in them. Lifted over lanes, all share the pages."""

    pages: PagedKVCache  # the same for all lanes
    table_R: jax.Array  # int32, the row's pages
    length: jax.Array  # int32 scalar, positions in the row before the chunk
    step: jax.Array  # int32 scalar, steps of the chunk before this one (the same for all lanes)
    live: jax.Array  # bool scalar: a lane without a thread, or whose thread stopped, writes to the trash page
    impl: Impl = dataclasses.field(metadata={"static": True})
    tile: HeadTile = dataclasses.field(metadata={"static": True})

    @property
    def carried(self) -> PagedKVCache:
        """What a step hands to the next one."""
        return self.pages

    def attend(
        self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, Self]:
        """See `llama.KVCache`. T = 1, and `positions_T` = length + step."""
        old = self.pages
        out_NH, k_pages, v_pages = _attend_row(
            (q_TNH[0], k_TKH[0], v_TKH[0], positions_T[0], self.live, self.table_R),
            old.keys[layer],
            old.values[layer],
            self.impl,
            self.tile,
        )
        keys = (*old.keys[:layer], k_pages, *old.keys[layer + 1 :])
        values = (*old.values[:layer], v_pages, *old.values[layer + 1 :])
        return out_NH[None], dataclasses.replace(self, pages=PagedKVCache(keys, values))


def _attend_row(
    thread: tuple[jax.Array, ...], k_pages: jax.Array, v_pages: jax.Array, impl: Impl, tile: HeadTile
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One thread's write and attention: output `[N, H]` and the successors of both kinds of pages.

    Lifted over lanes it becomes one scatter and one kernel for all of them, on one set of pages.
    """

    def all_lanes(thread: tuple[jax.Array, ...], k_pages: jax.Array, v_pages: jax.Array) -> tuple[jax.Array, ...]:
        q_LNH, k_LKH, v_LKH, position_L, live_L, tables_LR = thread
        return write_then_attend(
            q_LNH, k_LKH, v_LKH, k_pages, v_pages, position_L, live_L, tables_LR, impl=impl, tile=tile
        )

    @jax.custom_batching.custom_vmap
    def attend(
        thread: tuple[jax.Array, ...], k_pages: jax.Array, v_pages: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        out_LNH, k_pages, v_pages = all_lanes(jax.tree.map(lambda x: x[None], thread), k_pages, v_pages)
        return out_LNH[0], k_pages, v_pages

    @attend.def_vmap
    def lifted(
        axis_size: int, in_batched: Any, thread: tuple[jax.Array, ...], k_pages: jax.Array, v_pages: jax.Array
    ) -> Any:
        thread_lifted, *pages_lifted = in_batched
        assert not any(pages_lifted)
        thread = tuple(
            x if is_lifted else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            for x, is_lifted in zip(thread, thread_lifted, strict=True)
        )
        return all_lanes(thread, k_pages, v_pages), (True, False, False)

    return attend(thread, k_pages, v_pages)
