"""The slow and obviously right decoder that others are held to: no cache, the whole sequence again for each token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.model.llama import Llama


@nnx.jit
def _logits(model: Llama, tokens_T: jax.Array) -> jax.Array:
    hidden, _ = model(tokens_T, jnp.arange(tokens_T.shape[0]))
    return model.logits(hidden)


def naive_decode(model: Llama, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The `num_tokens` greedy tokens after a prompt. What is not decoded yet is padding, which causality hides."""
    tokens = [int(token) for token in prompt]
    length = len(tokens) + num_tokens
    for _ in range(num_tokens):
        padded_T = jnp.asarray(tokens + [0] * (length - len(tokens)), jnp.int32)
        tokens.append(int(jnp.argmax(_logits(model, padded_T)[len(tokens) - 1])))
    return tokens[len(prompt) :]
