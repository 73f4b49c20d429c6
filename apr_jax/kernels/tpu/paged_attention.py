"""Decode and prefill attention on TPUs, on pages in place, by a kernel of our own (`write_then_attend.py`).

A page holds all heads of a position side by side. One head's 64 elements would be padded to 128 in a TPU's memory, and
copies of one head each are too small for its bandwidth.
"""

import math

import jax
import jax.numpy as jnp

from apr_jax.config import ConfigError
from apr_jax.kernels.tpu.write_then_attend import LANES, UNIT, write_then_attend
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.online_softmax import Block
from apr_jax.model.paged_attention import Attended, PagedAttention, Places


def tile_of(head_dim: int, heads_per_shard: int) -> HeadTile:
    """Return the tile that lays a shard's heads side by side, in rows of whole vector registers."""
    return HeadTile(heads_per_shard, -heads_per_shard * head_dim % LANES)


def check_page_size(page_size: int) -> None:
    """Raise ConfigError for a page that the kernel's copies cannot take."""
    if page_size % UNIT:
        raise ConfigError(
            f"engine.page_size={page_size} must be a multiple of {UNIT} on a TPU (engine.decode_attention)"
        )


class TpuPagedAttention(PagedAttention):
    """The `PagedAttention` of decode steps, whose lanes are one position each, of different rows."""

    def step(self, q_LNH: jax.Array, k_LKH: jax.Array, v_LKH: jax.Array, pages: Block, places: Places) -> Attended:
        """See `PagedAttention`."""
        q_L1NH, k_L1KH, v_L1KH = (x[:, None] for x in (_scaled(q_LNH), k_LKH, v_LKH))
        counts_L = places.live_L.astype(jnp.int32)
        out_L1NH, pages = write_then_attend(
            q_L1NH, k_L1KH, v_L1KH, pages, places.positions_L, counts_L, places.tables_LR
        )
        return out_L1NH[:, 0], pages


class TpuUnitAttention(PagedAttention):
    """The `PagedAttention` of prefill, whose lanes come in units: UNIT neighbouring positions of one row.

    A unit begins at a multiple of UNIT, those of its positions that are live are neighbours, and it has one table. All
    are written before any attends.
    """

    def step(self, q_LNH: jax.Array, k_LKH: jax.Array, v_LKH: jax.Array, pages: Block, places: Places) -> Attended:
        """See `PagedAttention`. There is a table for each unit."""
        units = [x.reshape(-1, UNIT, *x.shape[1:]) for x in (_scaled(q_LNH), k_LKH, v_LKH)]
        live = places.live_L.reshape(-1, UNIT)
        starts = places.positions_L[::UNIT] + jnp.argmax(live, axis=1).astype(jnp.int32)
        counts = jnp.sum(live.astype(jnp.int32), axis=1)
        out, pages = write_then_attend(units[0], units[1], units[2], pages, starts, counts, places.tables_LR)
        return out.reshape(q_LNH.shape), pages


def _scaled(q_LNH: jax.Array) -> jax.Array:
    return (q_LNH / math.sqrt(q_LNH.shape[-1])).astype(q_LNH.dtype)
