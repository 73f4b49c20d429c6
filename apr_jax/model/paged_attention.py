"""Attention of one new position a lane to the lane's pages, where they lie.

`PagedAttention` is by XLA and runs anywhere. It is exact in float32, and what the kernels of `apr_jax.kernels`, its
subclasses, are tested against. Letters besides those of `model/__init__.py`: J head groups of a page, W elements of a
group in one position, M query heads of one group (`head_tile.py`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from apr_jax.model.head_tile import PLAIN, HeadTile
from apr_jax.model.online_softmax import Block, Part, empty_part, merge, normalise, softmax_part
from apr_jax.model.paged_cache import pages_per_span
from apr_jax.parallel.mesh import DATA_AXIS, TENSOR_AXIS, partition_spec

Attended = tuple[jax.Array, Block]  # outputs [L, N, H], and the pages of keys and of values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """The place of each lane's token in its thread's row."""

    positions_L: jax.Array  # int32
    live_L: (
        jax.Array
    )  # bool: a lane without a thread, or whose thread stopped, writes to the trash page and sees nothing
    tables_LR: jax.Array  # int32, the pages of each row in order, whole spans of them (`pages_per_row`); fewer rows
    # than lanes where an attention takes neighbouring lanes together

    @property
    def seen_L(self) -> jax.Array:
        """Return how many positions of its row each lane sees, its own included; 0 where it is not live."""
        return jnp.where(self.live_L, self.positions_L + 1, 0)


@dataclasses.dataclass(frozen=True)
class PagedAttention:
    """A way to write a step's keys and values to the pages, and to attend to them there. `tile` says how heads lie."""

    tile: HeadTile = PLAIN

    def __call__(self, q_LNH: jax.Array, k_LKH: jax.Array, v_LKH: jax.Array, pages: Block, places: Places) -> Attended:
        """Write each live lane's key and value at its position in its row, then attend to all up to it.

        On a mesh that splits heads this is mapped over all axes but "data", which the engine has mapped already: the
        partitioner cannot split a kernel.

        Args:
            q_LNH, k_LKH, v_LKH: RoPE applied; scores are scaled by 1/sqrt(H).
            pages: of keys and of values, each `[P, J, C, W]`. Every element must be finite.
        """
        arguments = (q_LNH, k_LKH, v_LKH, pages, places)
        unmapped = set(jax.sharding.get_abstract_mesh().axis_names) - {DATA_AXIS}
        if not unmapped:
            return self.step(*arguments)
        heads, whole = partition_spec(None, TENSOR_AXIS), partition_spec()
        specs = (heads, heads, heads, heads, whole)
        mapped = jax.shard_map(self.step, in_specs=specs, out_specs=heads, axis_names=unmapped, check_vma=False)
        return mapped(*arguments)

    def step(self, q_LNH: jax.Array, k_LKH: jax.Array, v_LKH: jax.Array, pages: Block, places: Places) -> Attended:
        """Write and attend on one device, with its own heads."""
        k_pages, v_pages = (
            write_positions(old, new, self.tile, places) for old, new in zip(pages, (k_LKH, v_LKH), strict=True)
        )
        return self.attend(q_LNH, (k_pages, v_pages), places), (k_pages, v_pages)

    def attend(self, q_LNH: jax.Array, pages: Block, places: Places) -> jax.Array:
        """Attend to what the lanes see; zeros where that is nothing. Gathers some pages of every row at a time."""
        (L, N, H), K = q_LNH.shape, pages[0].shape[1] * self.tile.heads
        q_LKMH = (q_LNH / math.sqrt(H)).astype(q_LNH.dtype).reshape(L, K, N // K, H)
        out_LKMH = normalise(attend_rows(q_LKMH, pages, places.seen_L, places.tables_LR, self.tile))
        return out_LKMH.reshape(q_LNH.shape).astype(q_LNH.dtype)


def attend_rows(q_LKMH: jax.Array, pages: Block, lengths_L: jax.Array, tables_LR: jax.Array, tile: HeadTile) -> Part:
    """Attend from scaled queries to the first `lengths_L` positions of each lane's row, in spans of some pages.

    As many spans are read as the longest row has. To the others the further ones change no bit.
    """
    (L, K, M, H), (P, J, C, W) = q_LKMH.shape, pages[0].shape
    B = pages_per_span(C)

    def gather(pages_PJCW: jax.Array, pairs_LJB: jax.Array) -> jax.Array:
        # A pair (page, group) is contiguous. Gathered pair by pair, in the order of the product, nothing is transposed.
        gathered_LJBCW = pages_PJCW.reshape(P * J, C, W).at[pairs_LJB].get(mode="promise_in_bounds")
        return tile.unpack(gathered_LJBCW.reshape(L, J, B * C, W))

    def attend(span: jax.Array, part: Part) -> Part:
        tables_LB = jax.lax.dynamic_slice_in_dim(tables_LR, span * B, B, axis=1)
        pairs_LJB = pairs_of(tables_LB, J)
        positions_1S = (span * B * C + jnp.arange(B * C))[None]
        mask_L11S = (positions_1S < lengths_L[:, None])[:, None, None]
        block = gather(pages[0], pairs_LJB), gather(pages[1], pairs_LJB)
        return merge(part, softmax_part(q_LKMH, block, mask_L11S))

    spans = (jnp.max(lengths_L) + B * C - 1) // (B * C)
    return jax.lax.fori_loop(0, spans, attend, empty_part((L, K, M), H))


def pairs_of(tables_LR: jax.Array, J: int) -> jax.Array:
    """Return a row's (page, group) pairs `[L, J, R]`, as indices into `P * J` pages."""
    return tables_LR[:, None] * J + jnp.arange(J, dtype=tables_LR.dtype)[None, :, None]


def write_positions(pages_PJCW: jax.Array, new_LKH: jax.Array, tile: HeadTile, places: Places) -> jax.Array:
    """Write one position a live lane; the others write to the trash page.

    The pages are taken as rows of one long list: with (page, place) as the scatter's index XLA's TPU compiler gives the
    pages another layout than the kernels want, and copies all of them in every layer of every step.
    """
    (P, J, C, W), positions_L = pages_PJCW.shape, places.positions_L
    page_L = jnp.take_along_axis(places.tables_LR, positions_L[:, None] // C, axis=1)[:, 0]
    page_L = jnp.where(places.live_L, page_L, 0)
    rows_LJ = (page_L[:, None] * J + jnp.arange(J)[None]) * C + (positions_L % C)[:, None]
    new_LJW = tile.pack(new_LKH[:, :, None])[:, :, 0]
    rows = pages_PJCW.reshape(P * J * C, W).at[rows_LJ.reshape(-1)]
    return rows.set(new_LJW.reshape(-1, W), mode="promise_in_bounds").reshape(pages_PJCW.shape)
