"""The plain maths equals NumPy's in float64, also in bfloat16 to its rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.ops import XLA
from apr_jax.model.rope import Frequencies, rope_angles, rope_angles_once
from apr_jax.model.sampling import log_probs, sample


def normal(*shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def exact(x):
    return np.asarray(x.astype("float32"), np.float64)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_products_of_several_matrices(shape):
    x, matrices = normal(*shape, 7), [normal(7, width, seed=width) for width in (4, 6)]
    made = XLA.matmul(x, matrices, [4, 6])
    for ours, matrix in zip(made, matrices, strict=True):
        np.testing.assert_allclose(ours, exact(x) @ exact(matrix), atol=1e-5)


def test_logits_are_float32():
    x, head = normal(2, 3, 8, dtype="bfloat16"), normal(8, 11, seed=1, dtype="bfloat16")
    made = XLA.logits(x, head, 11)
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, exact(x) @ exact(head), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_is_computed_in_float32(dtype):
    x, scale = normal(2, 3, 8, dtype=dtype), normal(8, seed=1)
    through, made = XLA.norm(x, scale, 1e-3)
    assert through is x
    expected = exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + 1e-3) * exact(scale)
    np.testing.assert_allclose(exact(made), expected, rtol=2.0**-8 if dtype == "bfloat16" else 1e-5)


def test_swiglu_is_silu_times_up():
    gate, up = 8 * normal(3, 5), normal(3, 5, seed=1)
    np.testing.assert_allclose(XLA.swiglu(gate, up), exact(gate) / (1 + np.exp(-exact(gate))) * exact(up), atol=1e-5)


def test_rotations_turn_pairs_and_add_up():
    x, positions = normal(3, 2, 8), jnp.array([0, 5, 40])
    made = XLA.rope(x, rope_angles(positions, Frequencies(8, 100.0)))
    pairs = exact(x)[..., :4] + 1j * exact(x)[..., 4:]
    turned = pairs * np.exp(1j * np.asarray(positions)[:, None, None] * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(made, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    further = XLA.rope(made, rope_angles(jnp.array([7, 7, 7]), Frequencies(8, 100.0)))
    np.testing.assert_allclose(further, XLA.rope(x, rope_angles(positions + 7, Frequencies(8, 100.0))), atol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (2, 12), (3, 2, 5)])
def test_angles_in_a_loop_are_the_same(shape):
    positions = jnp.arange(np.prod(shape)).reshape(shape)
    frequencies = Frequencies(8, 1e4)
    both = rope_angles_once(positions, frequencies), rope_angles(positions, frequencies)
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_draws_are_those_of_the_sampling_policy_lane_by_lane(temperature):
    logits_LV, uniform_L, banned_V = 3 * normal(9, 20), jax.random.uniform(jax.random.key(1), (9,)), jnp.arange(20) < 4
    token_L, logprob_L = XLA.draw(logits_LV, jnp.float32(temperature), banned_V, uniform_L)
    for lane in range(9):
        logprobs_V = log_probs(logits_LV[lane], temperature, banned_V)
        assert token_L[lane] == sample(logprobs_V, uniform_L[lane], temperature)
        np.testing.assert_allclose(logprob_L[lane], logprobs_V[token_L[lane]], atol=1e-6)
