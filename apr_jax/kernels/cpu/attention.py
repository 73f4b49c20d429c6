"""Attention by the C++ kernels: of training rows in float32, and of decode steps on pages in float32 and bfloat16.

In training sixteen queries at a time see the keys from the beginning of the first one's segment to their own end, so
the work follows the segments, and neither scores nor operands are copied for a whole row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.kernels.cpu import bindings
from apr_jax.kernels.mesh import over_rows_and_heads
from apr_jax.model.attention import named, segment_starts
from apr_jax.model.online_softmax import Block
from apr_jax.model.paged_attention import Attended, PagedAttention, Places

BLOCK = 16  # of the kernels, along T and H


def takes_heads(head_dim: int) -> bool:
    """Return True if training attention's kernels take heads of this size."""
    return head_dim % BLOCK == 0


def training_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, ends_BT: jax.Array | None = None
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
    return out_BTNH, (inputs, out_BTNH, lse_BNT)


def _backward(saved: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    inputs, out_BTNH, lse_BNT = saved
    return *bindings.attention_backward(inputs, out_BTNH, lse_BNT, dout_BTNH), None, None


_attend.defvjp(_forward, _backward)


class CpuPagedAttention(PagedAttention):
    """The `PagedAttention` of a kernel that writes and attends."""

    def step(self, q_LNH: jax.Array, k_LKH: jax.Array, v_LKH: jax.Array, pages: Block, places: Places) -> Attended:
        """See `PagedAttention`. All lanes write before any attends, so lanes may be neighbouring positions of a row."""
        return bindings.write_then_attend(q_LNH, k_LKH, v_LKH, pages, places.seen_L, places.tables_LR)
