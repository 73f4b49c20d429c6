"""Truncated sampling: the tokens that are too improbable to be drawn, cut off by top-k, top-p and min-p.

The engine applies the rules and notes how many tokens they left for each draw; the trainer keeps as many, the most
probable ones of its own logits (docs/sampling.md says why). Every rule keeps the tokens above some log-probability, so
all three together are one number, and tokens of equal probability share their fate.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from apr_jax.config import RolloutConfig
from apr_jax.model.sampling import MASKED_LOGIT


@dataclasses.dataclass(frozen=True)
class Truncation:
    """The tokens that may be drawn, by three rules in this order, as Hugging Face applies them."""

    top_k: int = 0  # the k most probable (Fan et al. 2018, arXiv 1805.04833); 0: all
    top_p: float = 1.0  # of those the fewest whose shares add up to p (Holtzman et al. 2019, arXiv 1904.09751); 1: all
    min_p: float = 0.0  # those with p times the probability of the first (Nguyen et al. 2024, arXiv 2407.01082); 0: all

    @property
    def cuts(self) -> bool:
        """True where a rule may cut tokens off."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def truncation_of(rollout: RolloutConfig) -> Truncation:
    """Return what a configuration cuts off."""
    return Truncation(rollout.top_k, rollout.top_p, rollout.min_p)


def truncated(logprobs: jax.Array, truncation: Truncation) -> jax.Array:
    """Return the log-probabilities `[..., V]` of the truncated policy: MASKED_LOGIT-like where a token is cut off.

    Args:
        logprobs: float32 `[..., V]`, tempered, and without banned tokens.
        truncation: what is cut off.
    """
    if not truncation.cuts:
        return logprobs
    cut = logprobs < _least(logprobs, truncation)
    return jax.nn.log_softmax(jnp.where(cut, MASKED_LOGIT, logprobs), axis=-1)


def count_kept(logprobs: jax.Array) -> jax.Array:
    """Count the tokens that are not cut off, int32 `[...]`, in what `truncated` returned."""
    return jnp.sum(logprobs > MASKED_LOGIT / 2, axis=-1, dtype=jnp.int32)


def keep_most(logprobs: jax.Array, kept: jax.Array, drawn: jax.Array) -> jax.Array:
    """Return the log-probabilities `[..., V]` of a policy that is cut off after its most probable tokens.

    Args:
        logprobs: float32 `[..., V]`, as of `truncated`. No gradient flows through the choice.
        kept: int32 `[...]`, the number of tokens that stay, with those as probable as the last; 0: all.
        drawn: int32 `[...]`, tokens that are known to have been drawn. They stay, wherever an update moves them.
    """
    codes = _ordered_codes(jax.lax.stop_gradient(logprobs))
    is_drawn = jax.lax.broadcasted_iota(jnp.int32, logprobs.shape, logprobs.ndim - 1) == drawn[..., None]
    stays = (codes >= _largest_code(codes, kept[..., None])) | is_drawn | (kept[..., None] == 0)
    return jax.nn.log_softmax(jnp.where(stays, logprobs, MASKED_LOGIT), axis=-1)


def _ordered_codes(values: jax.Array) -> jax.Array:
    """Return uint32 codes of float32 numbers, in the same order."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_code(codes: jax.Array, count: jax.Array) -> jax.Array:
    """Return the largest code that at least `count` of `codes[..., V]` reach, `[..., 1]`.

    It is found bit by bit: a sort of a large vocabulary takes much longer.
    """

    def with_bit(index: jax.Array, least: jax.Array) -> jax.Array:
        more = least | jnp.uint32(1) << (31 - index).astype(jnp.uint32)
        reached = jnp.sum(codes >= more, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(reached >= count, more, least)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((*codes.shape[:-1], 1), jnp.uint32))


def _least(logprobs: jax.Array, truncation: Truncation) -> jax.Array:
    """Return the least log-probability that is not cut off, `[..., 1]`."""
    size = logprobs.shape[-1]
    least = jnp.full((*logprobs.shape[:-1], 1), -jnp.inf)
    if truncation.top_k or truncation.top_p < 1:
        sorted_K = jax.lax.top_k(logprobs, min(truncation.top_k or size, size))[0]
        shares_K = jax.nn.softmax(sorted_K, axis=-1)
        before_K = jnp.cumsum(shares_K, axis=-1) - shares_K
        kept_K = before_K < truncation.top_p if truncation.top_p < 1 else jnp.ones(shares_K.shape, bool)
        last = jnp.maximum(jnp.sum(kept_K, axis=-1, keepdims=True) - 1, 0)
        least = jnp.take_along_axis(sorted_K, last, axis=-1)
    if truncation.min_p:
        least = jnp.maximum(least, jnp.max(logprobs, axis=-1, keepdims=True) + math.log(truncation.min_p))
    return least
