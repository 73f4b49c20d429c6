"""Causal attention within segments by the kernels of `native.py`: float32, on CPUs that have a C++ compiler.

Sixteen queries at a time see the keys from the beginning of the first one's segment to their own end, so the work
follows the segments, and neither scores nor operands are copied for a whole row. Letters of shapes are in `llama.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.model import native
from apr_jax.model.window_attention import named, segment_starts

_BLOCK = 16  # of the kernels, along T and H


def is_possible(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the kernels take such heads, and this process has them."""
    return dtype == jnp.float32 and head_dim % _BLOCK == 0 and native.is_available()


def cpu_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention to the earlier tokens of a query's own segment; scores scaled by 1/sqrt(H).

    The tokens of a segment lie side by side. Rows are padded to a multiple of the block.

    Args:
        ends_BT: int32, the first later time that does not see a token, if it comes before the segment's end.
    """
    T = q_BTNH.shape[1]
    if ends_BT is None:
        ends_BT = jnp.full_like(segment_ids_BT, T)
    pad = [(0, 0), (0, -T % _BLOCK)]
    inputs = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, ends_BT)
    *operands, ids_BT, ends_BT = (jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2)) for x in inputs)
    return _attend(*operands, segment_starts(ids_BT), ends_BT)[:, :T]


@jax.custom_vjp
def _attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array, ends_BT: jax.Array
) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, first_BT, ends_BT)[0]


def _forward(*inputs: jax.Array) -> tuple[jax.Array, Any]:
    out_BTNH, lse_BNT = named(native.attention(*inputs))
    return out_BTNH, (*inputs, out_BTNH, lse_BNT)


def _backward(saved: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    return *native.attention_backward(*(*saved, dout_BTNH)), None, None


_attend.defvjp(_forward, _backward)
