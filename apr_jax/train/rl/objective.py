"""GRPO and its relatives: functions of the configuration and a batch's tokens. Shapes: B rows, T time.

    loss = sum_t [ -weight_t w_t surrogate_t + kl_weight_t k3_t ]

Advantages and weights come from the host, once for the global batch, so that neither packing nor microbatches nor the
mesh change the loss. The surrogate is computed on the device. OBJECTIVES names the three parts of each:

    objective  advantage A             weight_t       surrogate_t                                  source (arXiv)
    grpo       (r - mean)/(std + eps)  1/(N n_r T_c)  min(rho A, clip(rho) A)                      2402.03300 eq. 3,
                                                                                                   2504.15466 sec. 4.3
    dr_grpo    r - mean                1/(R M)        as grpo                                      2503.20783 sec. 3.2
    dapo       as grpo                 1/sum_c T_c    as grpo                                      2503.14476 eq. 8, 12
    gspo       as grpo                 1/(N n_r T_c)  min(s A, clip(s) A), s = exp(mean log rho)   2507.18071 eq. 5-7
    cispo      as grpo                 1/sum_c T_c    stop_gradient(clip(rho)) A new               2506.13585 eq. 4-5

These papers call a response what is here a rollout of several calls, each a sequence in training. R is the number of
rollouts, N of calls, n_r of the calls in rollout r, T_c of the tokens that call c generated, M the `length_normaliser`.
rho = exp(new - old) is a token's ratio, and clip(x) limits x to [1 - clip_ratio, 1 + clip_ratio_high]. With one call a
rollout each objective is its paper's formula.

    k3_t = exp(ref_t - new_t) - (ref_t - new_t) - 1     is >= 0 and an unbiased estimate of KL(new || reference)
    w_t  = min(exp(old_t - rollout_t), importance_cap)  corrects for an engine whose numbers differ from the trainer's;
                                                        it is 1 where importance_cap is 0

No token may make a step overflow, so two things are bounded where log-probabilities differ by more than 20 nats, far
outside any clip. A ratio counts as e^20 at most. A token with a negative advantage, which the clip does not bound, then
has no gradient, as in dual-clip PPO (1912.09729, eq. 5, which bounds the ratio at 3). k3 (Schulman 2020,
joschu.net/blog/kl-approx.html) goes on as its tangent: its gradient stays that of 20 nats, and still draws the policy
back to the reference.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.config import GRPOConfig, check_choice
from apr_jax.train.rl.advantage import centred, normalised

Array = jax.Array

_MOST_NATS = 20.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The target tokens of a batch of packed rows. All arrays are [B, T] and float32, except `call_BT`."""

    logprob_BT: Array  # the policy's; gradients flow through these alone
    old_logprob_BT: Array  # the policy's before the first update on this batch
    reference_logprob_BT: Array
    rollout_logprob_BT: Array  # the engine's, when it drew the token
    advantage_BT: Array
    policy_weight_BT: Array  # above 0 exactly on generated tokens
    kl_weight_BT: Array
    call_BT: Array  # int32 in [0, T], tells the calls of a row apart

    @property
    def generated_BT(self) -> Array:
        """True on the tokens that were generated and are learnt from."""
        return self.policy_weight_BT > 0

    @property
    def log_ratio_BT(self) -> Array:
        """log rho = new - old, and 0 where nothing was generated."""
        old_BT = jax.lax.stop_gradient(self.old_logprob_BT)
        return jnp.where(self.generated_BT, self.logprob_BT - old_BT, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """The loss and its figures, as sums over tokens: those of microbatches add up."""

    policy_loss: Array
    kl_loss: Array
    clipped: Array  # tokens that the surrogate clips
    k3: Array  # unweighted sum of the KL estimate
    tokens: Array
    advantaged: Array  # tokens whose advantage is not 0

    @property
    def loss(self) -> Array:
        """The scalar to minimise."""
        return self.policy_loss + self.kl_loss


class CallWeights(NamedTuple):
    """The weights of every generated token of one call."""

    policy: float
    kl: float


@dataclasses.dataclass(frozen=True)
class Objective:
    """An RL objective.

    advantages: (config, rewards) -> float64, one a rollout (`advantage.normalised`).
    weights: (config, rollout of each call, generated tokens of each call) -> the weights of each call's tokens.
    terms: (config, tokens) -> the loss terms.
    """

    advantages: Callable[[GRPOConfig, Sequence[float]], np.ndarray]
    weights: Callable[[GRPOConfig, Sequence[int], Sequence[int]], list[CallWeights]]
    terms: Callable[[GRPOConfig, Tokens], Terms]


def choose_objective(config: GRPOConfig) -> Objective:
    """Return the objective that `config.objective` names. Raises ConfigError for a name that is not in OBJECTIVES."""
    check_choice("grpo.objective", config.objective, OBJECTIVES)
    return OBJECTIVES[config.objective]


def call_weights(config: GRPOConfig, rollouts: Sequence[int], tokens: Sequence[int]) -> list[CallWeights]:
    """Weigh a call as 1/(N n_r), spread over its tokens; the KL term as kl_coef/N.

    L = 1/N sum_c [ 1/n_r mean_t(-surrogate_t) + kl_coef mean_t(k3_t) ]     (arXiv 2504.15466, section 4.3)

    A call without generated tokens counts in N and n_r and has no token to weigh.
    """
    calls_of: dict[int, int] = {}
    for rollout in rollouts:
        calls_of[rollout] = calls_of.get(rollout, 0) + 1
    total = len(rollouts)
    return [
        CallWeights(1.0 / (total * calls_of[rollout] * max(count, 1)), config.kl_coef / (total * max(count, 1)))
        for rollout, count in zip(rollouts, tokens, strict=True)
    ]


def rollout_weights(config: GRPOConfig, rollouts: Sequence[int], tokens: Sequence[int]) -> list[CallWeights]:
    """Weigh every token as 1/(R M): R rollouts that have calls, and a constant length M = `length_normaliser`."""
    policy = 1.0 / (max(len(set(rollouts)), 1) * config.length_normaliser)
    return [CallWeights(policy, config.kl_coef * policy)] * len(tokens)


def token_weights(config: GRPOConfig, rollouts: Sequence[int], tokens: Sequence[int]) -> list[CallWeights]:
    """Weigh every token as 1/(generated tokens of the batch)."""
    policy = 1.0 / max(sum(tokens), 1)
    return [CallWeights(policy, config.kl_coef * policy)] * len(tokens)


def clip_tokens(config: GRPOConfig, tokens: Tokens) -> Terms:
    """Return the terms of PPO's surrogate of each token's ratio (arXiv 1707.06347, eq. 7): GRPO, Dr. GRPO, DAPO."""
    return loss_terms(config, tokens, *clipped_surrogate(config, tokens.log_ratio_BT, tokens.advantage_BT))


def clip_calls(config: GRPOConfig, tokens: Tokens) -> Terms:
    """Return GSPO's terms: the clipped surrogate of a call's ratio, the geometric mean of its tokens' ratios.

    A call lies within one row, so sums over a row's calls suffice, however rows are split.
    """
    sums_BT = _sum_of_call(tokens.log_ratio_BT, tokens.call_BT)
    counts_BT = _sum_of_call(tokens.generated_BT.astype(jnp.float32), tokens.call_BT)
    mean_BT = sums_BT / jnp.maximum(counts_BT, 1.0)
    return loss_terms(config, tokens, *clipped_surrogate(config, mean_BT, tokens.advantage_BT))


def clip_weights(config: GRPOConfig, tokens: Tokens) -> Terms:
    """Return CISPO's terms: the clipped ratio, without its gradient, weighs the log-probability, so every token learns.

    The paper has no lower bound: `clip_ratio` >= 1.
    """
    ratio_BT = _ratio(jax.lax.stop_gradient(tokens.log_ratio_BT))
    clipped_BT = jnp.clip(ratio_BT, *_bounds(config))
    logprob_BT = jnp.where(tokens.generated_BT, tokens.logprob_BT, 0.0)
    return loss_terms(config, tokens, clipped_BT * tokens.advantage_BT * logprob_BT, clipped_BT != ratio_BT)


def clipped_surrogate(config: GRPOConfig, log_ratio_BT: Array, advantage_BT: Array) -> tuple[Array, Array]:
    """Return min(r A, clip(r) A) with r = exp(log ratio), and where it is clipped."""
    ratio_BT = _ratio(log_ratio_BT)
    plain_BT = ratio_BT * advantage_BT
    clipped_BT = jnp.clip(ratio_BT, *_bounds(config)) * advantage_BT
    return jnp.minimum(plain_BT, clipped_BT), clipped_BT < plain_BT


def loss_terms(config: GRPOConfig, tokens: Tokens, surrogate_BT: Array, clipped_BT: Array) -> Terms:
    """Return the terms of the loss that maximises a surrogate: the sums at the top of this file.

    Args:
      surrogate_BT: finite wherever nothing was generated.
      clipped_BT: bool, tokens that the surrogate clips; counted only.
    """
    generated_BT, weight_BT = tokens.generated_BT, tokens.policy_weight_BT
    old_BT, reference_BT = jax.lax.stop_gradient((tokens.old_logprob_BT, tokens.reference_logprob_BT))
    if config.importance_cap > 0:
        gap_BT = jnp.where(generated_BT, old_BT - tokens.rollout_logprob_BT, 0.0)
        weight_BT = weight_BT * jnp.minimum(_ratio(gap_BT), config.importance_cap)
    k3_BT = _k3(jnp.where(generated_BT, reference_BT - tokens.logprob_BT, 0.0))
    return Terms(
        policy_loss=-jnp.sum(weight_BT * surrogate_BT),
        kl_loss=jnp.sum(tokens.kl_weight_BT * k3_BT),
        clipped=jnp.sum(clipped_BT & generated_BT),
        k3=jnp.sum(k3_BT),
        tokens=jnp.sum(generated_BT),
        advantaged=jnp.sum(generated_BT & (tokens.advantage_BT != 0)),
    )


OBJECTIVES = {
    "grpo": Objective(normalised, call_weights, clip_tokens),
    "dr_grpo": Objective(centred, rollout_weights, clip_tokens),
    "dapo": Objective(normalised, token_weights, clip_tokens),
    "gspo": Objective(normalised, call_weights, clip_calls),
    "cispo": Objective(normalised, token_weights, clip_weights),
}


def _ratio(log_ratio_BT: Array) -> Array:
    return jnp.exp(jnp.minimum(log_ratio_BT, _MOST_NATS))


def _k3(to_reference_BT: Array) -> Array:
    """Return exp(x) - x - 1, and above `_MOST_NATS` its tangent there."""
    exact_BT = jnp.minimum(to_reference_BT, _MOST_NATS)
    beyond_BT = to_reference_BT - exact_BT
    return jnp.exp(exact_BT) * (1 + beyond_BT) - to_reference_BT - 1


def _bounds(config: GRPOConfig) -> tuple[float, float]:
    return 1 - config.clip_ratio, 1 + config.clip_ratio_high


def _sum_of_call(values_BT: Array, call_BT: Array) -> Array:
    """Return at each position the sum of the values over its call; ids lie in [0, T]."""
    most = call_BT.shape[1] + 1

    def sum_in_row(values_T: Array, ids_T: Array) -> Array:
        return jax.ops.segment_sum(values_T, ids_T, num_segments=most)[ids_T]

    return jax.vmap(sum_in_row)(values_BT, call_BT)
