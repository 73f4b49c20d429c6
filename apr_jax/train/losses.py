"""Scores of target tokens, and the loss of SFT. Shapes: B rows, T time, D embed, V vocab, C chunks.

Every loss is `sum_t weight_t * loss_t` with weights that the host computed once for the global batch. So gradient
accumulation, packing and sharding only reorder one sum and cannot change what is learnt.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.parallel.mesh import num_row_shards

MAX_LOGITS = 1 << 24  # logits held at a time, in elements: 64 MiB in float32

Logits = Callable[[jax.Array], jax.Array]
LogProbs = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The scores of given target tokens from one forward pass."""

    logprob_BT: jax.Array  # float32, log pi(target)
    top_BT: jax.Array  # bool: the target is the most probable token


def num_chunks(batch: int, time: int, vocab: int, max_logits: int = MAX_LOGITS) -> int:
    """Return the least divisor C of `time` with batch * (time / C) * vocab <= max_logits, or else `time`."""
    return next((c for c in range(1, time + 1) if time % c == 0 and batch * (time // c) * vocab <= max_logits), time)


def token_scores(
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    logits: Logits,
    log_probs: LogProbs,
    vocab: int,
    max_logits: int = MAX_LOGITS,
    given: tuple[jax.Array, ...] = (),
) -> TokenScores:
    """Score the targets in chunks of time, so that [B, T, V] logits never exist when they are many.

    Args:
      hidden_BTD: the model's final hidden states.
      targets_BT: int32 token ids in [0, vocab).
      logits: hidden [..., D] -> float32 logits [..., V].
      log_probs: logits [..., V] and the same positions of `given` -> float32 normalised log-probabilities
        (`jax.nn.log_softmax` in SFT, the engine's sampling policy in GRPO).
      vocab: V. Each device holds at most `max_logits` elements of logits at a time; chunks are recomputed in the
        backward pass.
      given: arrays [B, T, ...].
    """
    batch, time = targets_BT.shape

    def score(hidden_BUD: jax.Array, targets_BU: jax.Array, *given: jax.Array) -> TokenScores:
        logprobs_BUV = log_probs(logits(hidden_BUD), *given)
        # A masked sum, whose gradient is a mask, too: that of an index would be a scatter.
        ids_BUV = jax.lax.broadcasted_iota(jnp.int32, logprobs_BUV.shape, logprobs_BUV.ndim - 1)
        chosen_BUV = targets_BU[..., None] == ids_BUV
        picked_BU = jnp.sum(jnp.where(chosen_BUV, logprobs_BUV, 0.0), axis=-1)
        return TokenScores(picked_BU, picked_BU >= jnp.max(logprobs_BUV, axis=-1))

    chunks = num_chunks(-(-batch // num_row_shards()), time, vocab, max_logits)
    if chunks == 1:
        return score(hidden_BTD, targets_BT, *given)
    arrays_CBU = jax.tree.map(
        lambda x_BT: x_BT.reshape(batch, chunks, time // chunks, *x_BT.shape[2:]).swapaxes(0, 1),
        (hidden_BTD, targets_BT, *given),
    )
    scores_CBU = jax.lax.map(jax.checkpoint(lambda xs: score(*xs)), arrays_CBU)
    return jax.tree.map(lambda x_CBU: x_CBU.swapaxes(0, 1).reshape(batch, time), scores_CBU)


def weighted_nll(logprob_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Return SFT's loss, sum_t weight_t * -log pi(target_t). Weights of a global batch sum to 1 (`normalise`)."""
    return -jnp.sum(weights_BT * logprob_BT)


def normalise(weights: np.ndarray) -> np.ndarray:
    """Scale a global batch's weights to sum 1 (float32). Raises ValueError when no token carries weight."""
    total = float(np.sum(weights, dtype=np.float64))
    if total <= 0:
        raise ValueError(f"a batch of shape {weights.shape} has no token to learn from: its weights sum to {total}")
    return (weights / total).astype(np.float32)
