"""GRPO and its relatives, by the name that `grpo.objective` gives. Shapes: B rows, T time.

Each is one sum over generated tokens, loss = -sum_t weight_t * w_t * surrogate_t (+ the KL term), and differs in three
things: how rewards become advantages and which weight a token has (the host, once for the global batch), and the
surrogate (the device). w_t is the truncated importance weight of the rollout/trainer gap (`losses.grpo_loss`).

What these papers call a response is here a rollout of several *calls*, each a sequence in training. Notation: R
rollouts; N calls in the batch, n_r of them in rollout r; T_c generated tokens in call c; A the advantage;
rho_t = exp(new_t - old_t); c- = clip_ratio, c+ = clip_ratio_high. With one call a rollout, each is its paper's formula.
The KL term is kl_coef times the token's policy weight times k3_t, but for GRPO and GSPO, which follow the APR paper's
1 / (N T_c) (`losses.call_weights`).

Clip-higher is `clip_ratio_high > clip_ratio`; dynamic sampling is `dynamic_sampling.py`. Either goes with
any objective.
DAPO's third part, a soft penalty on overlong responses, is not here: `grpo.reward` prices tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.config import GRPOConfig
from apr_jax.train.losses import CallWeights, Drawn, Surrogate, call_weights, group_advantages, ppo_clip

Weigh = Callable[[Sequence[int], Sequence[int], float], list[CallWeights]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What makes an objective.

    advantages: (rewards, group size, eps) -> float64, one a rollout; groups lie next to each other.
    weigh: (rollout of each call, generated tokens of each call, kl_coef) -> the weights of each call's tokens.
    surrogate: segment ids [B, T] -> the function of the tokens drawn, as `losses.ppo_clip`.
    """

    advantages: Callable[[Sequence[float], int, float], np.ndarray]
    weigh: Weigh
    surrogate: Callable[[jax.Array], Surrogate]


def make_objective(config: GRPOConfig) -> Objective:
    """The objective that `config.objective` names."""
    makers: dict[str, Callable[[GRPOConfig], Objective]] = {
        "grpo": grpo,
        "dr_grpo": dr_grpo,
        "dapo": dapo,
        "gspo": gspo,
        "cispo": cispo,
    }
    return makers[config.objective](config)


def grpo(config: GRPOConfig) -> Objective:
    """GRPO (arXiv 2402.03300, eq. 3) as the APR paper has it (arXiv 2504.15466, section 4.3).

    L = -1/N sum_c 1/n_r 1/T_c sum_t min(rho_t A, clip(rho_t, 1 - c-, 1 + c+) A),   A = (r - mean) / (std + eps)
    """
    del config
    return Objective(group_advantages, call_weights, _of_tokens)


def dr_grpo(config: GRPOConfig) -> Objective:
    """Dr. GRPO (arXiv 2503.20783, section 3.2): neither a standard deviation nor a length to divide by.

    L = -1/R sum_r 1/M sum_c,t min(rho_t A, clip(rho_t, 1 - c-, 1 + c+) A),   A = r - mean,   M = length_normaliser
    """
    return Objective(
        centred_advantages,
        functools.partial(rollout_weights, tokens_per_rollout=config.length_normaliser),
        _of_tokens,
    )


def dapo(config: GRPOConfig) -> Objective:
    """DAPO (arXiv 2503.14476, eq. 8 and 12): every token of the batch weighs the same.

    L = -1/(sum_c T_c) sum_c,t min(rho_t A, clip(rho_t, 1 - c-, 1 + c+) A),   A = (r - mean) / (std + eps)

    The paper has c- = 0.2, c+ = 0.28 (clip-higher), no KL term, and groups that all have a signal: set `max_resamples`.
    """
    del config
    return Objective(group_advantages, token_weights, _of_tokens)


def gspo(config: GRPOConfig) -> Objective:
    """GSPO (arXiv 2507.18071, eq. 5 to 7): one ratio a sequence, normalised by its length. A sequence is a call.

    L = -1/N sum_c 1/n_r min(s_c A, clip(s_c, 1 - c-, 1 + c+) A),   s_c = exp(1/T_c sum_t (new_t - old_t))

    The paper has c- = 3e-4, c+ = 4e-4: the ratio is a geometric mean and moves less than a token's.
    """
    del config
    return Objective(group_advantages, call_weights, lambda ids_BT: functools.partial(sequence_clip, ids_BT))


def cispo(config: GRPOConfig) -> Objective:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the ratio is clipped and is a weight, so every token learns.

    L = -1/(sum_c T_c) sum_c,t sg(clip(rho_t, 1 - c-, 1 + c+)) A new_t,   A = (r - mean) / (std + eps)

    sg stops the gradient. The paper has no lower bound: clip_ratio >= 1.
    """
    del config
    return Objective(group_advantages, token_weights, lambda _: clipped_weight)


def centred_advantages(rewards: Sequence[float], group_size: int, eps: float) -> np.ndarray:
    """r - mean within each group: float64 [num rollouts]. Exactly 0 in a group whose rewards are all equal."""
    del eps
    rewards_RG = np.asarray(rewards, np.float64).reshape(-1, group_size)
    equal_R1 = np.ptp(rewards_RG, axis=1, keepdims=True) == 0
    return np.where(equal_R1, 0.0, rewards_RG - rewards_RG.mean(axis=1, keepdims=True)).reshape(-1)


def rollout_weights(
    rollout_of_call: Sequence[int], tokens_of_call: Sequence[int], kl_coef: float, *, tokens_per_rollout: int
) -> list[CallWeights]:
    """1 / (R M) for every token: R rollouts that have calls, M = tokens_per_rollout."""
    policy = 1.0 / (max(len(set(rollout_of_call)), 1) * tokens_per_rollout)
    return [CallWeights(policy, kl_coef * policy)] * len(tokens_of_call)


def token_weights(rollout_of_call: Sequence[int], tokens_of_call: Sequence[int], kl_coef: float) -> list[CallWeights]:
    """1 / (generated tokens of the batch) for every token."""
    del rollout_of_call
    policy = 1.0 / max(sum(tokens_of_call), 1)
    return [CallWeights(policy, kl_coef * policy)] * len(tokens_of_call)


def sequence_clip(
    segment_ids_BT: jax.Array, drawn: Drawn, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate of the segment's ratio exp(mean log ratio of its generated tokens), at each token.

    A segment lies within a row, so that sums over a row's segments are all it takes, however rows are split.
    """
    sums_BT = _sum_of_segment(jnp.where(drawn.generated_BT, drawn.log_ratio_BT, 0.0), segment_ids_BT)
    counts_BT = _sum_of_segment(drawn.generated_BT.astype(jnp.float32), segment_ids_BT)
    mean = dataclasses.replace(drawn, log_ratio_BT=sums_BT / jnp.maximum(counts_BT, 1.0))
    return ppo_clip(mean, clip_low, clip_high)


def clipped_weight(drawn: Drawn, clip_low: float, clip_high: float) -> tuple[jax.Array, jax.Array]:
    """The log-probability, weighted by the advantage and by the clipped ratio, through which no gradient flows."""
    ratio_BT = jnp.exp(jax.lax.stop_gradient(drawn.log_ratio_BT))
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    return clipped_BT * drawn.advantage_BT * drawn.logprob_BT, clipped_BT != ratio_BT


def _of_tokens(segment_ids_BT: jax.Array) -> Surrogate:
    del segment_ids_BT
    return ppo_clip


def _sum_of_segment(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """At each position the sum of `values` over its segment; ids lie in [0, T]."""
    most = segment_ids_BT.shape[1] + 1

    def of_row(values_T: jax.Array, ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_T, ids_T, num_segments=most)[ids_T]

    return jax.vmap(of_row)(values_BT, segment_ids_BT)
