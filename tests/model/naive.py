"""The slow and obviously right decoder that others are held to: no cache, the whole sequence again for each token."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.model.llama import Llama
from apr_jax.model.views.training import training_rows


@nnx.jit
def _logits(model: Llama, tokens_T: jax.Array) -> jax.Array:
    hidden, _ = model(tokens_T, training_rows(model.config, jnp.arange(tokens_T.shape[0])))
    return model.logits(hidden)


def naive_decode(model: Llama, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The `num_tokens` greedy tokens after a prompt. What is not decoded yet is padding, which causality hides."""
    tokens = [int(token) for token in prompt]
    length = len(tokens) + num_tokens
    for _ in range(num_tokens):
        padded_T = jnp.asarray(tokens + [0] * (length - len(tokens)), jnp.int32)
        tokens.append(int(jnp.argmax(_logits(model, padded_T)[len(tokens) - 1])))
    return tokens[len(prompt) :]


@nnx.jit
def _batch_logits(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    hidden, _ = model(tokens_BT, training_rows(model.config, positions_BT))
    return model.logits(hidden)


def naive_logits(model: Llama, rows: Sequence[Sequence[int]], width: int, batch: int = 32) -> Iterator[np.ndarray]:
    """Float32 logits `[len(row), V]` of each row of tokens, at most `width` of them: one plain forward, no cache.

    `naive_decode` takes the argmax of the last; so a row's tokens are greedy if each is the argmax of the place before.
    """
    for start in range(0, len(rows), batch):
        tokens_BT = np.zeros((batch, width), np.int32)
        for index, row in enumerate(rows[start : start + batch]):
            tokens_BT[index, : len(row)] = row
        logits_BTV = np.array(_batch_logits(model, jnp.asarray(tokens_BT)), np.float32)
        for index, row in enumerate(rows[start : start + batch]):
            yield logits_BTV[index, : len(row)]
