"""Attention of one new position a lane to the lane's pages, where they lie.

`PlainPagedAttention` runs anywhere. It is exact in float32, and what the kernels of `apr_jax.kernels` are tested
against. Letters besides those of `model/__init__.py`: J head groups of a page, W elements of a group in one position,
M query heads of one group (`head_tile.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from apr_jax.model.head_tile import PLAIN, HeadTile
from apr_jax.model.online_softmax import Part, empty_part, merge, normalise, softmax_part
from apr_jax.model.paged_cache import pages_per_span
from apr_jax.parallel.mesh import DATA_AXIS, TENSOR_AXIS, partition_spec

Attended = tuple[jax.Array, jax.Array, jax.Array]  # outputs [L, N, H], and both kinds of pages


class PagedAttention(Protocol):
    """A way to write a step's keys and values to the pages, and to attend to them there."""

    @property
    def tile(self) -> HeadTile:
        """Return how key/value heads lie in the pages."""
        ...

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
        """Write each live lane's key and value at its position in its row, then attend to all up to it.

        Args:
            q_LNH, k_LKH, v_LKH: RoPE applied; scores are scaled by 1/sqrt(H).
            k_pages, v_pages: `[P, J, C, W]`. Every element must be finite.
            positions_L: int32.
            live_L: bool. Other lanes write to the trash page and attend to nothing.
            tables_LR: int32, the pages of each row in order, whole spans of them (`pages_per_row`).
        """
        ...


@dataclasses.dataclass(frozen=True)
class PlainPagedAttention:
    """Attention by XLA, which gathers some pages of every row at a time."""

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
        return over_heads(functools.partial(_write_then_gather, self.tile), *arguments)


def _write_then_gather(
    tile: HeadTile,
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
        write_positions(pages, new, tile, *places) for pages, new in ((k_pages, k_LKH), (v_pages, v_LKH))
    )
    (L, N, H), K = q_LNH.shape, k_LKH.shape[1]
    q_LKMH = (q_LNH / math.sqrt(H)).astype(q_LNH.dtype).reshape(L, K, N // K, H)
    seen_L = jnp.where(live_L, positions_L + 1, 0)
    out_LKMH = normalise(attend_rows(q_LKMH, k_pages, v_pages, seen_L, tables_LR, tile))
    return out_LKMH.reshape(q_LNH.shape).astype(q_LNH.dtype), k_pages, v_pages


def attend_rows(
    q_LKMH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths_L: jax.Array,
    tables_LR: jax.Array,
    tile: HeadTile,
) -> Part:
    """Attend from scaled queries to the first `lengths_L` positions of each lane's row, in spans of some pages.

    As many spans are read as the longest row has. To the others the further ones change no bit.
    """
    (L, K, M, H), (P, J, C, W) = q_LKMH.shape, k_pages.shape
    B = pages_per_span(C)

    def gather(pages_PJCW: jax.Array, pairs_LJB: jax.Array) -> jax.Array:
        # A pair (page, group) is contiguous. Gathered pair by pair, in the order of the product, nothing is transposed.
        gathered_LJBCW = pages_PJCW.reshape(P * J, C, W).at[pairs_LJB].get(mode="promise_in_bounds")
        return tile.unpack(gathered_LJBCW.reshape(L, J, B * C, W))

    def attend(span: jax.Array, part: Part) -> Part:
        tables_LB = jax.lax.dynamic_slice_in_dim(tables_LR, span * B, B, axis=1)
        pairs_LJB = tables_LB[:, None] * J + jnp.arange(J, dtype=tables_LB.dtype)[None, :, None]
        positions_1S = (span * B * C + jnp.arange(B * C))[None]
        mask_L11S = (positions_1S < lengths_L[:, None])[:, None, None]
        block = gather(k_pages, pairs_LJB), gather(v_pages, pairs_LJB)
        return merge(part, softmax_part(q_LKMH, block, mask_L11S))

    spans = (jnp.max(lengths_L) + B * C - 1) // (B * C)
    return jax.lax.fori_loop(0, spans, attend, empty_part((L, K, M), H))


def write_positions(
    pages_PJCW: jax.Array,
    new_LKH: jax.Array,
    tile: HeadTile,
    positions_L: jax.Array,
    live_L: jax.Array,
    tables_LR: jax.Array,
) -> jax.Array:
    """Write one position a live lane; the others write to the trash page.

    The pages are taken as rows of one long list: with (page, place) as the scatter's index XLA's TPU compiler gives the
    pages another layout than the kernels want, and copies all of them in every layer of every step.
    """
    (P, J, C, W), L = pages_PJCW.shape, len(positions_L)
    page_L = jnp.take_along_axis(tables_LR, positions_L[:, None] // C, axis=1)[:, 0]
    page_L = jnp.where(live_L, page_L, 0)
    rows_LJ = (page_L[:, None] * J + jnp.arange(J)[None]) * C + (positions_L % C)[:, None]
    new_LJW = tile.pack(new_LKH[:, :, None])[:, :, 0]
    rows = pages_PJCW.reshape(P * J * C, W).at[rows_LJ.reshape(-1)]
    return rows.set(new_LJW.reshape(L * J, W), mode="promise_in_bounds").reshape(pages_PJCW.shape)


def over_heads(attend: Callable[..., Attended], *arguments: jax.Array) -> Attended:
    """Call a `PagedAttention` on each device for its own heads, where a mesh splits them.

    The partitioner cannot split a kernel, so this maps it over all mesh axes but "data", which the engine has mapped
    already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    unmapped = set(mesh.axis_names) - {DATA_AXIS}
    if not unmapped:
        return attend(*arguments)
    heads, whole = partition_spec(None, TENSOR_AXIS), partition_spec()
    specs = (heads,) * 5 + (whole,) * 3
    mapped = jax.shard_map(attend, in_specs=specs, out_specs=heads, axis_names=unmapped, check_vma=False)
    attended: Attended = mapped(*arguments)
    return attended
