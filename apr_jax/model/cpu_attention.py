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


def cpu_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Softmax attention to the earlier tokens of a query's own segment; scores scaled by 1/sqrt(H).

    The tokens of a segment lie side by side. Rows are padded to a multiple of the block.
    """
    T = q_BTNH.shape[1]
    pad = [(0, 0), (0, -T % _BLOCK)]
    inputs = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    *operands, ids_BT = (jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2)) for x in inputs)
    return _attend(*operands, segment_starts(ids_BT))[:, :T]


@jax.custom_vjp
def _attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, first_BT)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array) -> tuple[jax.Array, Any]:
    out_BTNH, lse_BNT = named(native.attention(q_BTNH, k_BTKH, v_BTKH, first_BT))
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, first_BT, out_BTNH, lse_BNT)


def _backward(saved: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, first_BT, out_BTNH, lse_BNT = saved
    return *native.attention_backward(q_BTNH, k_BTKH, v_BTKH, first_BT, out_BTNH, lse_BNT, dout_BTNH), None


_attend.defvjp(_forward, _backward)
