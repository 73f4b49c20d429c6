"""The sampling policy: the engine draws from it, and the trainer scores with it.

Randomness is counter-based. A thread's key is a 64-bit hash of (seed, problem, sample, path) (`threads.thread_key`),
and its n-th generated token (counted over the thread's life, since truncation revisits positions) uses `fold_in(key,
n)` for one uniform number. So a draw depends on nothing else in the batch, on no schedule and on no resume.
"""

import math

import jax
import jax.numpy as jnp

from apr_jax.config_fields import LEAST_TEMPERATURE

MASKED_LOGIT = -1e30  # finite, so that differences of masked logits are no NaN
KEY_IMPL = "threefry2x32"
_TILE = 128  # the last axis of a TPU's tiles; a reshape to another width moves every element


def log_probs(logits: jax.Array, temperature: jax.Array | float, banned_mask: jax.Array) -> jax.Array:
    """Compute float32 log-probabilities `[..., V]` of the sampling policy.

    Args:
        logits: `[..., V]`.
        temperature: scalar >= 0. Below LEAST_TEMPERATURE sampling takes the argmax, and these are the policy's at
            temperature 1.
        banned_mask: bool `[V]`, or `[..., V]` as `logits` are; banned tokens get MASKED_LOGIT-like values,
            probability exactly 0.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    scaled = logits.astype(jnp.float32) / jnp.where(temperature >= LEAST_TEMPERATURE, temperature, 1.0)
    banned_mask = banned_mask.reshape((1,) * (logits.ndim - banned_mask.ndim) + banned_mask.shape)
    return jax.nn.log_softmax(jnp.where(banned_mask, MASKED_LOGIT, scaled), axis=-1)


def sample(logprobs_V: jax.Array, uniform: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Draw one token id (int32 scalar): the argmax below LEAST_TEMPERATURE, else by inverse CDF at `uniform` in [0, 1).

    The CDF is summed in two levels (`group_width`), so that no long scan is needed. A token of probability 0 is never
    drawn. Both are computed and one is chosen: a GPU would ask the host which branch of a condition to take, at
    every step of decode.
    """
    drawn, best = _inverse_cdf(jnp.exp(logprobs_V), uniform), _argmax(logprobs_V)
    return jnp.where(jnp.asarray(temperature, jnp.float32) >= LEAST_TEMPERATURE, drawn, best).astype(jnp.int32)


def probability_of_others(logprobs_V: jax.Array, token: jax.Array) -> jax.Array:
    """Add up the probability of all tokens but one. Without it the sum is exact also where that one has nearly all."""
    probs = _grouped(jnp.exp(logprobs_V))
    group, place = token // probs.shape[1], token % probs.shape[1]
    other_groups = jnp.where(jnp.arange(probs.shape[0]) == group, 0.0, jnp.sum(probs, axis=1))
    return jnp.sum(other_groups) + jnp.sum(jnp.where(jnp.arange(probs.shape[1]) == place, 0.0, probs[group]))


def _argmax(x_V: jax.Array) -> jax.Array:
    """Return the first index of the maximum, found in columns, so that a CPU takes many elements at once."""
    size = x_V.shape[0]
    width = group_width(size)
    x_GW = jnp.pad(x_V, (0, -size % width), constant_values=-jnp.inf).reshape(-1, width)
    top = jnp.max(jnp.max(x_GW, axis=0))
    groups = jnp.arange(x_GW.shape[0])[:, None]
    first_W = jnp.min(jnp.where(x_GW == top, groups, size), axis=0)
    return jnp.min(first_W * width + jnp.arange(width))


def _grouped(probs_V: jax.Array) -> jax.Array:
    """Reshape to `[groups, width]`, filled up with zeros."""
    width = group_width(probs_V.shape[0])
    return jnp.pad(probs_V, (0, -probs_V.shape[0] % width)).reshape(-1, width)


def group_width(size: int) -> int:
    """Return the tokens of a group: about sqrt(size), and in large vocabularies one row of a TPU's tile.

    It follows from the vocabulary alone, so that every platform adds up the same groups.
    """
    root = math.isqrt(size - 1) + 1
    return root if root < _TILE // 2 else _TILE


def _inverse_cdf(probs_V: jax.Array, uniform: jax.Array) -> jax.Array:
    probs = _grouped(probs_V)
    width = probs.shape[1]
    sums = jnp.cumsum(jnp.sum(probs, axis=1))
    threshold = uniform * sums[-1]
    group = _first_above(sums, threshold)
    before = jnp.where(group > 0, sums[jnp.maximum(group - 1, 0)], 0.0)
    return group * width + _first_above(jnp.cumsum(probs[group]), threshold - before)


def _first_above(cdf: jax.Array, threshold: jax.Array) -> jax.Array:
    """Return the first index whose CDF exceeds the threshold; if rounding leaves none, the last that adds to it."""
    previous = jnp.concatenate([jnp.zeros((1,), cdf.dtype), cdf[:-1]])
    adds = cdf > previous
    above = adds & (cdf > threshold)
    last = cdf.shape[0] - 1 - jnp.argmax(adds[::-1])
    return jnp.where(jnp.any(above), jnp.argmax(above), last)


def uniforms(key_data: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Draw float32 `[count]` in [0, 1): one number for each of a thread's generated tokens `first`, `first + 1`, ...

    Args:
        key_data: uint32 `[2]`.
        first: int32 scalar, tokens that the thread has generated before.
    """
    key = jax.random.wrap_key_data(key_data, impl=KEY_IMPL)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(first + jnp.arange(count))
    return jax.vmap(jax.random.uniform)(keys)
