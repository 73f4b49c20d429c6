"""Attention in parts that are merged (online softmax, Milakov and Gimelshein 2018).

A part without positions changes no bit of another. So a result does not depend on how many such parts there are, nor on
whether they are computed.
"""

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite: a masked score never makes a NaN

Block = tuple[jax.Array, jax.Array]  # keys and values [..., K, S, H]
Part = tuple[jax.Array, jax.Array, jax.Array]  # maximum and sum [..., K, M], weighted values [..., K, M, H]; float32


def empty_part(shape: tuple[int, ...], head_dim: int) -> Part:
    """Return the part of no positions, for queries `[*shape, head_dim]`."""
    return (
        jnp.full(shape, MASKED_SCORE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def softmax_part(q: jax.Array, block: Block, mask: jax.Array) -> Part:
    """Attend from scaled queries `q [..., K, M, H]` to one block, not yet normalised; `mask` says which keys count."""
    k, v = block
    scores = jnp.einsum("...KMH,...KSH->...KMS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, MASKED_SCORE)
    top = jnp.max(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0.0)
    values = jnp.einsum("...KMS,...KSH->...KMH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return top, jnp.sum(weights, axis=-1), values


def merge(first: Part, second: Part) -> Part:
    """Combine two parts into the softmax over both."""
    top = jnp.maximum(first[0], second[0])
    scales = [jnp.exp(part[0] - top) for part in (first, second)]
    total = first[1] * scales[0] + second[1] * scales[1]
    return top, total, first[2] * scales[0][..., None] + second[2] * scales[1][..., None]


def normalise(part: Part) -> jax.Array:
    """Return attention's output `[..., K, M, H]`, float32; zeros for queries that saw nothing."""
    _, total, out = part
    return out / jnp.where(total > 0, total, 1.0)[..., None]
