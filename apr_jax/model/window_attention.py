"""Causal attention within segments that computes what segments and causality leave, and little else. For CPUs.

A block of queries sees the keys from the beginning of its first token's segment to its own end: a window of the row.
The blocks are ordered by the length of their windows, and each length has a loop of its own, with static shapes and as
many rounds as there are blocks of that length (lengths in between take the next longer one, and the mask hides what is
too much). So there is neither a branch nor a bound to be guessed from data, no scores of a whole row, and the work
follows the segments of the batch. `attention.py` has the measurements; the letters of shapes are in `llama.py`, and
M = G T are the query rows of a block that share a key/value head.

Backward (Dao et al. 2022, algorithm 4): probabilities come back from the scores and their log-sum-exp, by windows.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

ATTENTION_NAME = "attention"  # of what a policy may keep, so that the backward pass need not attend anew
_MASKED = -1e30  # finite: a masked score never makes a NaN
_BLOCK = 32  # queries of a block, and the unit of the windows' lengths

Seen = tuple[jax.Array, jax.Array | None]  # of tokens: segment ids, and the first later time that does not see each


def named(outputs: Any) -> Any:
    """Marks what attention gave, so that a policy of `jax.checkpoint` can keep it."""
    return checkpoint_name(outputs, ATTENTION_NAME)  # type: ignore[no-untyped-call]


class _Windows(NamedTuple):
    """Blocks of queries, those of short windows first: `order` holds row * (T / block) + block."""

    order: jax.Array
    ends: jax.Array  # of each length: how many blocks come before the next length's


class _Place(NamedTuple):
    """Where a block of queries and its window of keys lie in the batch."""

    row: jax.Array
    query: jax.Array  # the first one's time
    key: jax.Array


def window_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention to the earlier tokens of a query's own segment; scores scaled by 1/sqrt(H), float32 inside.

    The tokens of a segment lie side by side. Rows are padded to a multiple of the block.

    Args:
        ends_BT: int32, the first later time that does not see a token, if it comes before the segment's end.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
    pad = [(0, 0), (0, -T % _BLOCK)]
    inputs = (q_BTNH * (1 / math.sqrt(H)), k_BTKH, v_BTKH, (segment_ids_BT, ends_BT))
    return _attend(*jax.tree.map(lambda x: jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2)), inputs))[:, :T]


@jax.custom_vjp
def _attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seen: Seen) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, seen)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seen: Seen) -> tuple[jax.Array, Any]:
    (B, T, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
    windows = _order_windows(seen[0])
    out_BTNH, lse_BKM = jnp.zeros_like(q_BTNH), jnp.zeros((B, K, N // K * T), jnp.float32)

    def attend(place: _Place, length: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out_BTNH, lse_BKM = state
        q_KMH, k_KSH = _queries(q_BTNH, place, K), _keys(k_BTKH, place, length)
        scores_KMS = _scores(q_KMH, k_KSH, _visible(seen, place, length))
        top_KM1 = jnp.max(scores_KMS, axis=-1, keepdims=True)
        weights_KMS = jnp.exp(scores_KMS - top_KM1)
        total_KM1 = jnp.sum(weights_KMS, axis=-1, keepdims=True)
        out_KMH = _product("KMS,KSH->KMH", weights_KMS.astype(v_BTKH.dtype), _keys(v_BTKH, place, length)) / total_KM1
        lse_1KM = (top_KM1 + jnp.log(total_KM1))[None, ..., 0]
        return (
            _put_queries(out_BTNH, out_KMH, place),
            jax.lax.dynamic_update_slice(lse_BKM, lse_1KM, (place.row, 0, place.query * (N // K))),
        )

    state = _over_windows(attend, windows, T, (out_BTNH, lse_BKM))
    out_BTNH, lse_BKM = named(state)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, seen, out_BTNH, lse_BKM, windows)


def _backward(saved: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, seen, out_BTNH, lse_BKM, windows = saved
    (_, T, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH, axis=-1)
    zeros = (jnp.zeros_like(q_BTNH), *(jnp.zeros(x.shape, jnp.float32) for x in (k_BTKH, v_BTKH)))

    def attend(place: _Place, length: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq_BTNH, dk_BTKH, dv_BTKH = state
        q_KMH, dout_KMH = _queries(q_BTNH, place, K), _queries(dout_BTNH, place, K)
        k_KSH, v_KSH = _keys(k_BTKH, place, length), _keys(v_BTKH, place, length)
        scores_KMS = _scores(q_KMH, k_KSH, _visible(seen, place, length))
        M = q_KMH.shape[1]
        lse_1KM = jax.lax.dynamic_slice(lse_BKM, (place.row, 0, place.query * (N // K)), (1, K, M))
        delta_KM1 = _queries(delta_BTN[..., None], place, K)
        weights_KMS = jnp.exp(scores_KMS - lse_1KM[0, ..., None])
        dweights_KMS = _product("KMH,KSH->KMS", dout_KMH, v_KSH)
        dscores_KMS = (weights_KMS * (dweights_KMS - delta_KM1)).astype(k_KSH.dtype)
        dq_KMH = _product("KMS,KSH->KMH", dscores_KMS, k_KSH)
        dk_KSH = _product("KMS,KMH->KSH", dscores_KMS, q_KMH)
        dv_KSH = _product("KMS,KMH->KSH", weights_KMS.astype(dout_KMH.dtype), dout_KMH)
        return (
            _put_queries(dq_BTNH, dq_KMH, place),
            _add_keys(dk_BTKH, dk_KSH, place),
            _add_keys(dv_BTKH, dv_KSH, place),
        )

    dq_BTNH, dk_BTKH, dv_BTKH = _over_windows(attend, windows, T, zeros)
    return dq_BTNH, dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


_attend.defvjp(_forward, _backward)


def window_lengths(T: int) -> tuple[int, ...]:
    """The lengths that windows of a row of T tokens are rounded up to: 1, 2, 3, 4, 6, 8, 12, 16, .. blocks, and T."""
    count = T // _BLOCK
    steps = {n for power in range(count.bit_length()) for n in (1 << power, 3 << power) if n < count}
    return tuple(_BLOCK * n for n in sorted(steps | {count}))


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Of each token, the time of its segment's first: int32 `[B, T]`."""
    times_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    begins_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT: jax.Array = jax.lax.cummax(jnp.where(begins_BT, times_1T, 0), axis=1)
    return starts_BT


def _order_windows(ids_BT: jax.Array) -> _Windows:
    T = ids_BT.shape[1]
    needed = (jnp.arange(_BLOCK, T + 1, _BLOCK)[None] - segment_starts(ids_BT)[:, ::_BLOCK]).reshape(-1)
    longer = needed[None] > jnp.asarray(window_lengths(T))[:, None]
    order = jnp.argsort(jnp.sum(longer, axis=0)).astype(jnp.int32)
    return _Windows(order, jnp.sum(~longer, axis=1, dtype=jnp.int32))


def _over_windows(attend: Any, windows: _Windows, T: int, state: Any) -> Any:
    """A loop for each length: `state = attend(place, length, state)` for each block whose window is so long."""
    start: Any = np.int32(0)
    for index, length in enumerate(window_lengths(T)):

        def body(turn: jax.Array, state: Any, length: int = length) -> Any:
            row, block = jnp.divmod(windows.order[turn], T // _BLOCK)
            query = block * _BLOCK
            return attend(_Place(row, query, jnp.maximum(query + _BLOCK - length, 0)), length, state)

        state = jax.lax.fori_loop(start, windows.ends[index], body, state)
        start = windows.ends[index]
    return state


def _visible(seen: Seen, place: _Place, length: int) -> jax.Array:
    """`[T, S]`: which key of the window each query of the block sees."""
    ids_BT, ends_BT = seen
    ids_1T = jax.lax.dynamic_slice(ids_BT, (place.row, place.query), (1, _BLOCK))
    ids_1S = jax.lax.dynamic_slice(ids_BT, (place.row, place.key), (1, length))
    times_T1 = place.query + jnp.arange(_BLOCK)[:, None]
    visible_TS = (place.key + jnp.arange(length)[None, :] <= times_T1) & (ids_1T[0][:, None] == ids_1S)
    if ends_BT is not None:
        visible_TS &= times_T1 < jax.lax.dynamic_slice(ends_BT, (place.row, place.key), (1, length))
    return visible_TS


def _scores(q_KMH: jax.Array, k_KSH: jax.Array, visible_TS: jax.Array) -> jax.Array:
    visible_MS = jnp.tile(visible_TS, (q_KMH.shape[1] // _BLOCK, 1))
    return jnp.where(visible_MS[None], _product("KMH,KSH->KMS", q_KMH, k_KSH), _MASKED)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _queries(x_BTNH: jax.Array, place: _Place, K: int) -> jax.Array:
    """The block's queries `[K, M, H]`."""
    N, H = x_BTNH.shape[2:]
    block_1TNH = jax.lax.dynamic_slice(x_BTNH, (place.row, place.query, 0, 0), (1, _BLOCK, N, H))
    return jnp.moveaxis(block_1TNH.reshape(_BLOCK, K, N // K, H), 0, 2).reshape(K, -1, H)


def _put_queries(x_BTNH: jax.Array, block_KMH: jax.Array, place: _Place) -> jax.Array:
    K, _, H = block_KMH.shape
    block_TKGH = jnp.moveaxis(block_KMH.reshape(K, -1, _BLOCK, H), 2, 0)
    block_1TNH = block_TKGH.reshape(1, _BLOCK, -1, H).astype(x_BTNH.dtype)
    return jax.lax.dynamic_update_slice(x_BTNH, block_1TNH, (place.row, place.query, 0, 0))


def _keys(x_BTKH: jax.Array, place: _Place, length: int) -> jax.Array:
    """The window's keys or values `[K, S, H]`."""
    window_1SKH = jax.lax.dynamic_slice(x_BTKH, (place.row, place.key, 0, 0), (1, length, *x_BTKH.shape[2:]))
    return jnp.swapaxes(window_1SKH[0], 0, 1)


def _add_keys(x_BTKH: jax.Array, window_KSH: jax.Array, place: _Place) -> jax.Array:
    at, (K, S, H) = (place.row, place.key, 0, 0), window_KSH.shape
    sum_1SKH = jax.lax.dynamic_slice(x_BTKH, at, (1, S, K, H)) + jnp.swapaxes(window_KSH, 0, 1)[None]
    return jax.lax.dynamic_update_slice(x_BTKH, sum_1SKH, at)
