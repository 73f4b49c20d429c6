"""Pages as the paged attention kernels of TPUs and GPUs want them, and what both do alike.

Both want pages heads first, `[heads, pages, ...]`. A pair (page, group) is as contiguous in `[P, J, C, W]`, so they are
given `P * J` pages of a single head, lanes times groups as their batch, and tables of pairs: a reshape, no copy.
Letters as in `model/paged_attention.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from apr_jax.model.head_tile import PLAIN, HeadTile
from apr_jax.model.paged_attention import Attended, over_heads, write_positions

# (queries [L, J, M, W], pages of keys and of values [P, J, C, W], lengths [L], tables [L, R]) -> outputs [L, J, M, W]
PagesKernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def pairs_of(tables_LR: jax.Array, J: int) -> jax.Array:
    """Return a row's (page, group) pairs `[L, J, R]`, as indices into `P * J` pages."""
    return tables_LR[:, None] * J + jnp.arange(J, dtype=tables_LR.dtype)[None, :, None]


@dataclasses.dataclass(frozen=True)
class KernelPagedAttention:
    """A `PagedAttention` by a kernel that attends to pages, which XLA writes before."""

    kernel: PagesKernel
    tile: HeadTile = PLAIN

    def __call__(
        self,
        q_LNH: jax.Array,
        k_LKH: jax.Array,
        v_LKH: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        positions_L: jax.Array,
        live_L: jax.Array,
        tables_LR: jax.Array,
    ) -> Attended:
        """See `PagedAttention`."""
        arguments = (q_LNH, k_LKH, v_LKH, k_pages, v_pages, positions_L, live_L, tables_LR)
        return over_heads(functools.partial(_write_then_attend, self), *arguments)


def _write_then_attend(
    how: KernelPagedAttention,
    q_LNH: jax.Array,
    k_LKH: jax.Array,
    v_LKH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    positions_L: jax.Array,
    live_L: jax.Array,
    tables_LR: jax.Array,
) -> Attended:
    places = (positions_L, live_L, tables_LR)
    k_pages, v_pages = (
        write_positions(pages, new, how.tile, *places) for pages, new in ((k_pages, k_LKH), (v_pages, v_LKH))
    )
    seen_L = jnp.where(live_L, positions_L + 1, 0)
    out_LNH = attend_to_pages(how.kernel, q_LNH, k_pages, v_pages, seen_L, tables_LR, how.tile)
    return out_LNH, k_pages, v_pages


def attend_to_pages(
    kernel: PagesKernel,
    q_LNH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths_L: jax.Array,
    tables_LR: jax.Array,
    tile: HeadTile,
) -> jax.Array:
    """Attend from one query a lane to the first `lengths_L` positions of its row; zeros where the length is 0."""
    q_LJMW = tile.pack_queries((q_LNH / math.sqrt(q_LNH.shape[-1])).astype(q_LNH.dtype), k_pages.shape[1])
    return tile.unpack_outputs(kernel(q_LJMW, k_pages, v_pages, lengths_L, tables_LR))
