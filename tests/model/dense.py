"""Attention of training rows the plain way, and inputs that try it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def plain_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    seen_BTS: jax.Array | None = None,
) -> jax.Array:
    groups, T = q_BTNH.shape[2] // k_BTKH.shape[2], q_BTNH.shape[1]
    k_BSNH, v_BSNH = jnp.repeat(k_BTKH, groups, axis=2), jnp.repeat(v_BTKH, groups, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
    visible = jnp.tril(jnp.ones((T, T), bool))[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    visible = visible if seen_BTS is None else visible & seen_BTS
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)


def random_inputs(B: int, T: int, N: int, K: int, H: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(T), 4)
    q_BTNH = jax.random.normal(keys[0], (B, T, N, H))
    k_BTKH, v_BTKH = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
    starts_BT = jax.random.bernoulli(keys[3], 0.05, (B, T)).astype(jnp.int32)
    return q_BTNH, k_BTKH, v_BTKH, 1 + jnp.cumsum(starts_BT, axis=1)


def out_and_grads(attend: Any, *inputs: jax.Array) -> Any:
    def loss(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> Any:
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, ids_BT)
        return jnp.sum(jnp.sin(out_BTNH.astype(jnp.float32))), out_BTNH

    (_, out_BTNH), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out_BTNH, *grads


def assert_all_close(ours: Any, theirs: Any, atol: float = 2e-5, rtol: float = 1e-7) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=rtol)


def random_ends(T: int, rows: int = 2) -> np.ndarray:
    """The time at which each token's branch ends: branches of branches, so whatever begins in one ends with it."""
    rng = np.random.default_rng(T)
    ends_BT = np.full((rows, T), T)
    for row in range(rows):
        for begin in range(0, T, 70):
            for start in sorted(rng.integers(begin, min(begin + 70, T), 4)):
                end = min(start + int(rng.integers(1, 60)), *ends_BT[row, start : start + 1])
                ends_BT[row, start:end] = np.minimum(ends_BT[row, start:end], end)
    return ends_BT


def assert_branches_that_have_ended_are_not_seen(attend: Any, T: int) -> None:
    """Each token reaches some way, not beyond those before it that are seen: as branches of a tree do."""
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(2, T, 4, 2, 16)
    ids_BT = jnp.where(jnp.arange(T)[None] < 200, ids_BT, 1_000)  # the last segment is a long one
    ends_BT = jnp.asarray(random_ends(T), jnp.int32)

    def plain(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        seen_BTS = jnp.arange(T)[None, :, None] < ends_BT[:, None, :]
        return plain_attention(q_BTNH, k_BTKH, v_BTKH, ids_BT, seen_BTS)

    def ours(*inputs: jax.Array) -> jax.Array:
        return attend(*inputs, ends_BT)

    inputs = (q_BTNH, k_BTKH, v_BTKH, ids_BT)
    assert_all_close(out_and_grads(ours, *inputs), out_and_grads(plain, *inputs), rtol=1e-5)
    assert not np.allclose(ours(*inputs), plain_attention(*inputs), atol=1e-2)


def assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment(attend: Any) -> None:
    q_BTNH, k_BTKH, v_BTKH, _ = random_inputs(1, 160, 2, 1, 16)
    ids_BT = jnp.asarray([[1] * 40 + [2] * 100 + [0] * 20])  # the second segment crosses a block's border

    @jax.jit
    def influence(t: jax.Array) -> jax.Array:
        """How far the output at t depends on the keys and values at each s."""

        def out(k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            return jnp.sum(jax.lax.dynamic_index_in_dim(attend(q_BTNH, k_BTKH, v_BTKH, ids_BT), t, 1))

        grads = jax.grad(out, argnums=(0, 1))(k_BTKH, v_BTKH)
        return sum((jnp.sum(jnp.abs(grad), axis=(0, 2, 3)) for grad in grads), start=jnp.zeros(160))

    for t in (0, 39, 40, 130, 139, 150):
        s = np.arange(160)
        visible = (s <= t) & (np.asarray(ids_BT[0]) == np.asarray(ids_BT[0, t]))
        np.testing.assert_array_equal(np.asarray(influence(t)) > 0, visible)


def assert_memory_is_linear(attend: Any) -> None:
    """The memory of a long row is far below its square."""

    def temporary_bytes(T: int) -> int:
        inputs = [jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, T), jnp.int32)]
        grad = jax.grad(lambda *args: jnp.sum(attend(*args)), argnums=(0, 1, 2))
        return int(jax.jit(grad).lower(*inputs).compile().memory_analysis().temp_size_in_bytes)

    assert temporary_bytes(4096) < 2.5 * temporary_bytes(2048)  # linear in T
    assert temporary_bytes(4096) < 4 * 4 * 4096**2 / 4  # a quarter of one float32 matrix [N, T, T]
