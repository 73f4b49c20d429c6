"""Training attention on TPUs by the Pallas kernel that JAX ships."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from apr_jax.config import ConfigError
from apr_jax.kernels.mesh import over_rows_and_heads
from apr_jax.model.attention import pad_to, round_up

_LANES = 128


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend with the Pallas kernel. Rows are padded to a multiple of 128 tokens.

    Args:
        ends_BT: must be None: the kernel knows segments, but not their branches. Raises ConfigError otherwise.
        interpret: run it on a CPU, for tests.
    """
    if ends_BT is not None:
        raise ConfigError("model.attention='splash' knows segments, but not their branches")
    T = q_BTNH.shape[1]
    length = round_up(T, _LANES)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    q_BTNH = pad_to(q_BTNH * (1 / math.sqrt(q_BTNH.shape[-1])), length)
    k_BTKH, v_BTKH, segment_ids_BT = pad_to(k_BTKH, length), pad_to(v_BTKH, length), pad_to(segment_ids_BT, length)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        sizes = splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        )
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * q_BTNH.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(a, 1, 2) for a in (q_BTNH, k_BTKH, v_BTKH))
        return jnp.swapaxes(jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(ids_BT, ids_BT)), 1, 2)

    return over_rows_and_heads(attend, 4)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)[:, :T]
