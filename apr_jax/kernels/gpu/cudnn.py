"""Training attention on GPUs by cuDNN: of packed segments by their lengths, and of segments with branches by a mask."""

import importlib
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.kernels.mesh import over_rows_and_heads
from apr_jax.model.attention import pad_to, round_up


def cudnn_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, ends_BT: jax.Array | None = None
) -> jax.Array:
    """Attend with cuDNN's flash attention, in bfloat16.

    Segments are a mask `[B, 1, T, T]`, which JAX hands to it as a bias, and the whole triangle is computed.
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


def takes_lengths() -> bool:
    """Return True where JAX can hand segments to cuDNN, which it offers under no public name: a Hopper GPU or newer."""
    fused = _fused_attention()
    return fused is not None and bool(fused.check_compute_capability("9.0"))


def packed_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_BM: jax.Array) -> jax.Array:
    """Attend with cuDNN's flash attention within segments, in bfloat16: neither a mask nor work for what it hides.

    Args:
        lengths_BM: int32, the lengths of all segments of the device's rows in order, as `data.segments.with_lengths`
            lays them out. They cover every token: what no segment covers would be left undefined.
    """
    fused, scale = _fused_attention(), 1 / math.sqrt(q_BTNH.shape[-1])

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_BM: jax.Array) -> jax.Array:
        # JAX up to 0.10 scales the offsets of keys by the number of query heads, so there are as many heads of both.
        k_BTNH, v_BTNH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
        offsets, lengths = offsets_of(lengths_BM, q_BTNH.shape[1])
        out: jax.Array = fused.dot_product_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=scale,
            mask_type=fused.MaskType.PADDING_CAUSAL,
        )
        return out

    return over_rows_and_heads(attend, 4)(q_BTNH, k_BTKH, v_BTKH, lengths_BM)


def offsets_of(lengths_BM: jax.Array, T: int) -> tuple[jax.Array, jax.Array]:
    """Return where segments begin `[B, M + 1]`, from the row of their place on, and their lengths; -1: no segment."""
    B, M = lengths_BM.shape
    begins_BM = jnp.cumsum(lengths_BM.reshape(-1)).reshape(B, M) - lengths_BM - T * jnp.arange(B)[:, None]
    offsets_BM, lengths_BM = (jnp.where(lengths_BM > 0, x, -1).astype(jnp.int32) for x in (begins_BM, lengths_BM))
    return jnp.pad(offsets_BM, ((0, 0), (0, 1)), constant_values=-1), lengths_BM


def _fused_attention() -> Any:
    """Return JAX's module of cuDNN's attention; None if it is not there or lacks the arguments that are used here."""
    try:
        fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        names = inspect.signature(fused.dot_product_attention).parameters
    except (ImportError, AttributeError):
        return None
    used = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"}
    return fused if used <= names.keys() and hasattr(fused, "check_compute_capability") else None
