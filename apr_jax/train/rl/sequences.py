"""From scored rollouts to the sequences that an update learns from (host, NumPy)."""

from collections.abc import Sequence

import numpy as np

from apr_jax.config import GRPOConfig
from apr_jax.data.prefixes import share_prefixes
from apr_jax.engine.constraints import BANS_NOTHING, Gate
from apr_jax.engine.threads import Call
from apr_jax.train.rl.objective import choose_objective
from apr_jax.train.rl.sample import Scored


def training_sequences(
    grpo: GRPOConfig, scored: Sequence[Scored], gate: Gate | None, *, branches: bool
) -> list[dict[str, np.ndarray]]:
    """Return a sequence for each call: context and generated tokens, with the objective's weights on the latter.

    Each holds, per target token: `tokens`, `targets` (int32), `advantage`, `policy_weight`, `kl_weight` and
    `rollout_logprob` (float32, 0 on context). With kl_coef 0 a call of advantage 0 has zero loss and zero gradient. It
    is left out, but counts in the others' weights. So is a call that generated nothing. Of a truncated policy there is
    `kept`, too (int32, `Call.kept`, 0 on context).

    Args:
      gate: the engine's. With one, a sequence also holds what its grammar allowed: `bans` (int32) and `allowed` (int32
        `[T, gate.num_choices]`, an id plus 1, or 0), as `policy_masks.banned_mask` takes them.
      branches: make one sequence, of up to `row_len` tokens, of calls of a thread that begin alike
        (data/prefixes.py).
    """
    calls = [
        (index, call, each.advantage * float(share))
        for index, each in enumerate(scored)
        for call, share in zip(each.rollout.calls, each.shares, strict=True)
    ]
    weights = choose_objective(grpo).weights(
        grpo, [index for index, _, _ in calls], [len(call.tokens) for _, call, _ in calls]
    )
    learnt = [
        (index, call, _sequence(call, advantage, weight.policy, weight.kl) | _constraints(call, gate))
        for (index, call, advantage), weight in zip(calls, weights, strict=True)
        if len(call.tokens) and (grpo.kl_coef > 0 or advantage != 0)
    ]
    sequences = [sequence for _, _, sequence in learnt]
    if not branches:
        return sequences
    families, first_targets = [index for index, _, _ in learnt], [len(call.context) - 1 for _, call, _ in learnt]
    return share_prefixes(sequences, families, first_targets, grpo.row_len)


def _sequence(call: Call, advantage: float, policy_weight: float, kl_weight: float) -> dict[str, np.ndarray]:
    tokens = np.concatenate([call.context, call.tokens]).astype(np.int32)
    generated = np.arange(1, len(tokens)) >= len(call.context)
    logprobs = np.zeros(len(tokens) - 1, np.float32)
    logprobs[generated] = call.logprobs
    kept = {}
    if call.kept is not None:
        kept["kept"] = np.zeros(len(tokens) - 1, np.int32)
        kept["kept"][generated] = call.kept
    return kept | {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "advantage": (advantage * generated).astype(np.float32),
        "policy_weight": (policy_weight * generated).astype(np.float32),
        "kl_weight": (kl_weight * generated).astype(np.float32),
        "rollout_logprob": logprobs,
    }


def _constraints(call: Call, gate: Gate | None) -> dict[str, np.ndarray]:
    """Return the call's masks at each of its target tokens; none for an engine without a gate."""
    if gate is None:
        return {}
    targets, first = len(call.context) + len(call.tokens) - 1, len(call.context) - 1
    bans = np.full(targets, BANS_NOTHING, np.int32)
    allowed = np.zeros((targets, gate.num_choices), np.int32)
    if call.masks is not None:
        bans[first:] = call.masks.bans
        allowed[first:, : call.masks.allowed.shape[1]] = call.masks.allowed + 1
    return {"bans": bans, "allowed": allowed}
