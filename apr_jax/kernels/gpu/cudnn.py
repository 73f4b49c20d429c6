"""Training attention on GPUs by cuDNN."""

import jax
import jax.numpy as jnp

from apr_jax.kernels.mesh import over_rows_and_heads
from apr_jax.model.attention import pad_to, round_up


def cudnn_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, ends_BT: jax.Array | None = None
) -> jax.Array:
    """Attend with cuDNN's flash attention, in bfloat16.

    Segments are a mask `[B, 1, T, T]`, which JAX hands to it as a bias.
    """
    T = q_BTNH.shape[1]
    length = round_up(T, 2)  # cuDNN takes a bias only for even lengths

    def attend(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array, ends_BT: jax.Array | None
    ) -> jax.Array:
        visible_BTS = ids_BT[:, :, None] == ids_BT[:, None, :]
        if ends_BT is not None:
            visible_BTS &= jnp.arange(length)[None, :, None] < ends_BT[:, None, :]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=visible_BTS[:, None], is_causal=True, implementation="cudnn"
        )

    # Where weights are split over "fsdp" the partitioner splits queries and keys in different ways, and cuDNN refuses.
    padded = [pad_to(x, length) for x in (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)]
    if ends_BT is not None:
        ends_BT = pad_to(ends_BT - length, length) + length  # padding sees itself: a row without a key is NaN
    return over_rows_and_heads(attend)(*padded, ends_BT)[:, :T]
