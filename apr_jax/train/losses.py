"""The losses, as pure functions. Shapes: B rows, T time, D embed, V vocab, C chunks.

Every loss is `sum_t weight_t * loss_t` with weights that the host computed once for the global batch. So gradient
accumulation, packing and sharding only reorder one sum and cannot change what is learnt.
"""

import dataclasses
from collections.abc import Callable, Sequence

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
    """What one forward pass says about given target tokens."""

    logprob_BT: jax.Array  # float32, log pi(target)
    top_BT: jax.Array  # bool: the target is the most probable token


def num_chunks(batch: int, time: int, vocab: int, max_logits: int = MAX_LOGITS) -> int:
    """The smallest divisor C of `time` with batch * (time / C) * vocab <= max_logits, or `time` if there is none."""
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
    """Scores the targets without ever holding [B, T, V] logits when they are many.

    Args:
      hidden_BTD: the model's final hidden states.
      targets_BT: int32 token ids in [0, vocab).
      logits: hidden [..., D] -> float32 logits [..., V].
      log_probs: logits [..., V] and the same positions of `given` -> float32 normalised log-probabilities
        (`jax.nn.log_softmax` in SFT, the engine's sampling policy in GRPO).
      vocab: V, which with `max_logits`, of a device, sets how many chunks of time there are; each is recomputed in the
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
    """SFT: sum_t weight_t * -log pi(target_t). Weights of a global batch sum to 1 (`normalise`)."""
    return -jnp.sum(weights_BT * logprob_BT)


def normalise(weights: np.ndarray) -> np.ndarray:
    """Scales a global batch's weights to sum 1 (float32). Raises ValueError when no token carries weight."""
    total = float(np.sum(weights, dtype=np.float64))
    if total <= 0:
        raise ValueError(f"a batch of shape {weights.shape} has no token to learn from: its weights sum to {total}")
    return (weights / total).astype(np.float32)


def group_advantages(rewards: Sequence[float], group_size: int, eps: float) -> np.ndarray:
    """GRPO's advantages: (r - mean) / (std + eps) within each group, population std (paper section 4.3).

    Args:
      rewards: one a rollout; groups lie next to each other.
    Returns: float64 [num rollouts]. A group whose rewards are all equal has advantage exactly 0.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    rewards_RG = np.asarray(rewards, np.float64).reshape(-1, group_size)
    centred_RG = rewards_RG - rewards_RG.mean(axis=1, keepdims=True)
    advantages_RG = centred_RG / (rewards_RG.std(axis=1, keepdims=True) + eps)
    equal_R1 = np.ptp(rewards_RG, axis=1, keepdims=True) == 0
    return np.where(equal_R1, 0.0, advantages_RG).reshape(-1)


@dataclasses.dataclass(frozen=True)
class CallWeights:
    """Weights of every generated token of one call."""

    policy: float
    kl: float


def call_weights(rollout_of_call: Sequence[int], tokens_of_call: Sequence[int], kl_coef: float) -> list[CallWeights]:
    """The weights that turn GRPO's nested means into one sum over tokens.

    L = 1/N sum_calls [ 1/n_r * mean_t(clip_t) + kl_coef * mean_t(k3_t) ]
      = sum_t policy_t * clip_t + kl_t * k3_t,   policy_t = 1 / (N n_r T_c),   kl_t = kl_coef / (N T_c)

    with N calls, n_r calls in the call's rollout and T_c generated tokens in the call. A call without generated tokens
    counts in N and n_r and has no token to weigh.
    """
    calls_of_rollout: dict[int, int] = {}
    for rollout in rollout_of_call:
        calls_of_rollout[rollout] = calls_of_rollout.get(rollout, 0) + 1
    total = len(rollout_of_call)
    return [
        CallWeights(
            policy=1.0 / (total * calls_of_rollout[rollout] * max(tokens, 1)), kl=kl_coef / (total * max(tokens, 1))
        )
        for rollout, tokens in zip(rollout_of_call, tokens_of_call, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GRPOTokens:
    """What the GRPO loss needs about each target token; float32 [B, T], 0 where a token carries no loss."""

    advantage_BT: jax.Array
    policy_weight_BT: jax.Array  # above 0 exactly on generated tokens
    kl_weight_BT: jax.Array
    rollout_logprob_BT: jax.Array  # the engine's, when it drew the token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GRPOTerms:
    """Sums over tokens, so that microbatches add up."""

    policy_loss: jax.Array
    kl_loss: jax.Array
    clipped: jax.Array  # tokens that the surrogate clips
    k3: jax.Array  # unweighted sum of the KL estimate
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a surrogate sees of the generated tokens; all [B, T]."""

    log_ratio_BT: jax.Array  # new - old log-probability; 0 where nothing was generated
    logprob_BT: jax.Array  # new; 0 where nothing was generated
    advantage_BT: jax.Array
    generated_BT: jax.Array  # bool


Surrogate = Callable[[Drawn, float, float], tuple[jax.Array, jax.Array]]


def ppo_clip(drawn: Drawn, clip_low: float, clip_high: float) -> tuple[jax.Array, jax.Array]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(new - old) of the token (arXiv 1707.06347, eq. 7).

    Returns: the objective, to be maximised, and where it is clipped; both [B, T].
    """
    ratio_BT = jnp.exp(drawn.log_ratio_BT)
    plain_BT = ratio_BT * drawn.advantage_BT
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high) * drawn.advantage_BT
    return jnp.minimum(plain_BT, clipped_BT), clipped_BT < plain_BT


def grpo_loss(
    logprob_BT: jax.Array,
    old_logprob_BT: jax.Array,
    reference_logprob_BT: jax.Array,
    tokens: GRPOTokens,
    *,
    clip_ratio: float,
    importance_cap: float,
    clip_ratio_high: float | None = None,
    surrogate: Surrogate = ppo_clip,
) -> tuple[jax.Array, GRPOTerms]:
    """The GRPO objective of a batch (or of a microbatch; they add up), or a relative's (`objectives.py`).

    loss = sum_t policy_weight_t * w_t * -surrogate_t + kl_weight_t * k3_t
    k3_t = exp(ref_t - new_t) - (ref_t - new_t) - 1                                  >= 0, unbiased for KL(new || ref)

    w_t = min(exp(old_t - rollout_t), importance_cap) corrects for an engine whose numbers differ from the trainer's
    (truncated importance sampling); it is 1 when importance_cap is 0. Gradients flow through `logprob_BT` only.

    Args:
      clip_ratio: how far a ratio may fall below 1, and without `clip_ratio_high` also how far above.
      surrogate: as `ppo_clip`, which is GRPO's.
    """
    old_BT, reference_BT = jax.lax.stop_gradient((old_logprob_BT, reference_logprob_BT))
    generated_BT = tokens.policy_weight_BT > 0
    drawn = Drawn(
        log_ratio_BT=jnp.where(generated_BT, logprob_BT - old_BT, 0.0),
        logprob_BT=jnp.where(generated_BT, logprob_BT, 0.0),
        advantage_BT=tokens.advantage_BT,
        generated_BT=generated_BT,
    )
    objective_BT, clipped_BT = surrogate(drawn, clip_ratio, clip_ratio if clip_ratio_high is None else clip_ratio_high)
    weight_BT = tokens.policy_weight_BT
    if importance_cap > 0:
        gap_BT = jnp.where(generated_BT, old_BT - tokens.rollout_logprob_BT, 0.0)
        weight_BT = weight_BT * jnp.minimum(jnp.exp(gap_BT), importance_cap)
    policy_loss = -jnp.sum(weight_BT * objective_BT)
    to_reference_BT = jnp.where(generated_BT, reference_BT - logprob_BT, 0.0)
    k3_BT = jnp.exp(to_reference_BT) - to_reference_BT - 1
    kl_loss = jnp.sum(tokens.kl_weight_BT * k3_BT)
    terms = GRPOTerms(
        policy_loss=policy_loss,
        kl_loss=kl_loss,
        clipped=jnp.sum(clipped_BT & generated_BT),
        k3=jnp.sum(k3_BT),
        tokens=jnp.sum(generated_BT),
    )
    return policy_loss + kl_loss, jax.lax.stop_gradient(terms)
