"""Attention by the C++ kernels: of training rows in float32, and of decode steps on pages in float32 and bfloat16.

In training sixteen queries at a time see the keys from the beginning of the first one's segment to their own end, so
the work follows the segments, and neither scores nor operands are copied for a whole row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.kernels.cpu import bindings
from apr_jax.kernels.mesh import over_rows_and_heads
from apr_jax.model.attention import named, segment_starts
from apr_jax.model.head_tile import PLAIN, HeadTile
from apr_jax.model.paged_attention import Attended, over_heads

BLOCK = 16  # of the kernels, along T and H


def takes_heads(head_dim: int) -> bool:
    """Return True if training attention's kernels take heads of this size."""
    return head_dim % BLOCK == 0


def training_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Attend as `model.attention.xla_attention`, float32, on each device of a mesh to its own rows and heads."""
    return over_rows_and_heads(_padded)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, ends_BT)


def _padded(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, ends_BT: jax.Array | None
) -> jax.Array:
    """Fill rows up to a multiple of the block, and attend."""
    T = q_BTNH.shape[1]
    if ends_BT is None:
        ends_BT = jnp.full_like(segment_ids_BT, T)
    pad = [(0, 0), (0, -T % BLOCK)]
    inputs = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, ends_BT)
    *operands, ids_BT, ends_BT = (jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2)) for x in inputs)
    return _attend(*operands, segment_starts(ids_BT), ends_BT)[:, :T]


@jax.custom_vjp
def _attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array, ends_BT: jax.Array
) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, first_BT, ends_BT)[0]


def _forward(*inputs: jax.Array) -> tuple[jax.Array, Any]:
    out_BTNH, lse_BNT = named(bindings.attention(*inputs))
    return out_BTNH, (*inputs, out_BTNH, lse_BNT)


def _backward(saved: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    return *bindings.attention_backward(*(*saved, dout_BTNH)), None, None


_attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class CpuPagedAttention:
    """The `PagedAttention` of a kernel that writes and attends."""

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
        """See `PagedAttention`. All lanes write before any attends, so lanes may be neighbouring positions of a row."""
        seen_L = jnp.where(live_L, positions_L + 1, 0)
        return over_heads(_write_then_attend, q_LNH, k_LKH, v_LKH, k_pages, v_pages, seen_L, live_L, tables_LR)


def _write_then_attend(
    q_LNH: jax.Array,
    k_LKH: jax.Array,
    v_LKH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    seen_L: jax.Array,
    live_L: jax.Array,
    tables_LR: jax.Array,
) -> Attended:
    del live_L
    return bindings.write_then_attend(q_LNH, k_LKH, v_LKH, k_pages, v_pages, seen_L, tables_LR)
