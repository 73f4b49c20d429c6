"""Attention of training rows: causal, within segments, by XLA in blocks of queries.

Neither the scores of a whole row nor their gradient ever exist, and blocks of keys to the right of the diagonal are
never computed. XLA runs unrolled blocks at once where it can, which costs memory. Rows above 1,024 tokens are therefore
loops over blocks, whose memory is O(block * T). `apr_jax.kernels` offers faster ways for one kind of machine each,
which are held to this one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from apr_jax.model.online_softmax import MASKED_SCORE

ATTENTION_NAME = "attention"  # a policy of `jax.checkpoint` may keep it, so that the backward pass need not attend anew
_BLOCK = 128
_UNROLLED = 1024  # up to this length every block is unrolled
_SPANS = 8  # a longer row is that many spans of queries, each a loop over its blocks

Seen = tuple[jax.Array, jax.Array | None]  # tokens' segment ids, and the first later time that does not see each


def named(outputs: Any) -> Any:
    """Mark attention's output, so that a policy of `jax.checkpoint` can keep it."""
    return checkpoint_name(outputs, ATTENTION_NAME)  # type: ignore[no-untyped-call]


def xla_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, ends_BT: jax.Array | None = None
) -> jax.Array:
    """Attend to the earlier tokens of each query's own segment; scores are scaled by 1/sqrt(H), float32 inside.

    Blocks of queries meet the keys up to the block's end, and are recomputed block by block in the backward pass.

    Args:
        q_BTNH, k_BTKH, v_BTKH: RoPE applied; query head n reads key/value head n // G.
        segment_ids_BT: int32, tokens of a row with one id lie side by side and see each other.
        ends_BT: int32, the first later time that does not see a token; None: none before its segment's end.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BKGTH = jnp.moveaxis((q_BTNH * (1 / math.sqrt(H))).reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    span = _BLOCK if T <= _UNROLLED else round_up(-(-T // _SPANS), _BLOCK)
    outs = []
    for start in range(0, T, span):
        end = min(start + span, T)
        ids_BT = segment_ids_BT[:, start:end]
        seen = (segment_ids_BT[:, :end], None if ends_BT is None else ends_BT[:, :end])
        outs.append(_attend_span(q_BKGTH[:, :, :, start:end], k_BKSH[:, :, :end], v_BKSH[:, :, :end], ids_BT, seen))
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H)


def _attend_span(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, ids_BT: jax.Array, seen: Seen) -> jax.Array:
    """Attend from the last T of S positions: one block, or several in a loop."""
    (B, K, G, T, H), S = q_BKGTH.shape, k_BKSH.shape[2]
    if T <= _BLOCK:
        return jax.checkpoint(_attend_block)(q_BKGTH, k_BKSH, v_BKSH, ids_BT, seen, S - T)
    count = -(-T // _BLOCK)
    length = count * _BLOCK
    q_BKGCTH = pad_to(q_BKGTH, length, axis=3).reshape(B, K, G, count, _BLOCK, H)
    ids_BCT = pad_to(ids_BT, length).reshape(B, count, _BLOCK)
    starts_C = S - T + _BLOCK * jnp.arange(count)

    @jax.checkpoint
    def attend(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_BKGTH, ids_BT, start = block
        return _attend_block(q_BKGTH, k_BKSH, v_BKSH, ids_BT, seen, start)

    out_CBKGTH = jax.lax.map(attend, (jnp.moveaxis(q_BKGCTH, 3, 0), jnp.moveaxis(ids_BCT, 1, 0), starts_C))
    return jnp.moveaxis(out_CBKGTH, 0, 3).reshape(B, K, G, length, H)[:, :, :, :T]


def _attend_block(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, ids_BT: jax.Array, seen: Seen, start: int | jax.Array
) -> jax.Array:
    (ids_BS, ends_BS), T = seen, ids_BT.shape[1]
    times_T1 = start + jnp.arange(T)[:, None]
    causal_TS = jnp.arange(ids_BS.shape[1])[None, :] <= times_T1
    visible_BTS = causal_TS[None] & (ids_BT[:, :, None] == ids_BS[:, None, :])
    if ends_BS is not None:
        visible_BTS &= times_T1[None] < ends_BS[:, None, :]
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    return attend_visible(scores, visible_BTS, v_BKSH).astype(q_BKGTH.dtype)


def attend_visible(scores_BKGTS: jax.Array, visible_BTS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Average values `[B, K, G, T, H]`, float32, by the softmax of the scores of what each query sees."""
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED_SCORE)
    weights = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return out / total


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Return the time of the first token of each token's segment, int32 `[B, T]`."""
    times_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    begins_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(begins_BT, times_1T, 0), axis=1)


def pad_to(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
    """Fill an axis up to a length with zeros. Causality keeps them out of sight of what is before."""
    return jnp.pad(x, [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)])


def round_up(value: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-value // multiple) * multiple
