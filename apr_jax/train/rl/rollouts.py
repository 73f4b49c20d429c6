"""From rollouts to a GRPO batch, on the host: rewards, advantages, one training sequence a call, and what to log."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from apr_jax.config import Config, GRPOConfig
from apr_jax.data.prefixes import share_prefixes
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import BANS_NOTHING, Gate
from apr_jax.engine.threads import Call, Rollout
from apr_jax.evaluation.metrics import record_rollout, summarize
from apr_jax.tasks import task_of
from apr_jax.tasks.base import Task
from apr_jax.train.losses import call_weights
from apr_jax.train.rl.credit import CREDITS
from apr_jax.train.rl.objectives import Weigh, make_objective
from apr_jax.train.rl.rewards import compose

_LOGGED = (
    "total_tokens",
    "sequential_tokens",
    "tokens_per_call",
    "children_per_rollout",
    "children_per_spawn",
    "spawn_depth",
    "malformed_rate",
    "malformed_reasons",
    "truncated_rate",
    "truncated_reasons",
    "child_failure_rate",
    "child_reasons",
    "child_solved_rate",
    "operations_right_rate",
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """The rollouts of one step with their rewards; groups lie next to each other."""

    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]  # rewards.py
    advantages: np.ndarray  # float64, one a rollout
    correct: tuple[bool, ...]  # the answer was verified
    shares: tuple[np.ndarray, ...] = ()  # of its rollout's advantage, one a call (credit.py); (): all have all of it


def choose_problems(num_problems: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """The indices of the problems of a step: distinct, and the same whenever (seed, step) is."""
    if prompts_per_step > num_problems:
        raise ValueError(f"grpo.prompts_per_step={prompts_per_step} exceeds the {num_problems} problems there are")
    chosen = np.random.default_rng((seed, step)).choice(num_problems, prompts_per_step, replace=False)
    return [int(index) for index in chosen]


def rollout_seed(seed: int, step: int) -> int:
    """The engine's seed of a step, below 2^31."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0] >> 1)


def score(
    rollouts: Sequence[Rollout],
    problems: Sequence[Any],
    config: GRPOConfig,
    task: Task,
    tokenizer: Tokenizer | None = None,
) -> Scored:
    """Verifies every rollout's answer, and scores it. Malformed and cut-off rollouts have no answer: they are wrong.

    `tokenizer` is read where credit is not every call's alike.
    """
    answers = [rollout.result.answer for rollout in rollouts]
    correct = tuple(task.verify(answer, problem).correct for answer, problem in zip(answers, problems, strict=True))
    rewards = compose(rollouts, correct, config.reward)
    advantages = make_objective(config).advantages(rewards, config.group_size, config.advantage_eps)
    shares: tuple[np.ndarray, ...] = ()
    if config.credit != "rollout":
        if task.name != "countdown":
            raise ValueError(f"grpo.credit={config.credit!r} reads Countdown's traces, not those of {task.name}")
        if tokenizer is None:
            raise ValueError(f"grpo.credit={config.credit!r} reads threads' text: pass the tokenizer")
        shares = tuple(CREDITS[config.credit](rollout, tokenizer) for rollout in rollouts)
    return Scored(tuple(rollouts), rewards, advantages, correct, shares)


def training_sequences(
    scored: Scored, kl_coef: float, gate: Gate | None = None, weigh: Weigh = call_weights, share: int = 0
) -> list[dict[str, np.ndarray]]:
    """One sequence a call: context and generated tokens, with the objective's weights on the generated ones.

    Each holds, per target token: `tokens`, `targets` (int32), `advantage`, `policy_weight`, `kl_weight` and
    `rollout_logprob` (float32, 0 on context). With kl_coef 0 a call of advantage 0 has zero loss and zero gradient: it
    is left out, and counts in the others' weights all the same. So is a call that generated nothing.

    With the `gate` of the engine that drew them each holds what its grammar allowed, too: `bans` (int32) and `allowed`
    (int32 `[T, gate.num_choices]`, an id plus 1, or 0), as `engine.holding.banned_mask` takes them.

    With `share` calls of a thread that begin alike become one sequence of up to so many tokens (`data/prefixes.py`).
    """
    calls = [
        (index, call, float(scored.advantages[index] * (scored.shares[index][number] if scored.shares else 1.0)))
        for index, rollout in enumerate(scored.rollouts)
        for number, call in enumerate(rollout.calls)
    ]
    weights = weigh([index for index, _, _ in calls], [len(call.tokens) for _, call, _ in calls], kl_coef)
    learnt = [
        (index, call, _sequence(call, advantage, weight.policy, weight.kl) | _constraints(call, gate))
        for (index, call, advantage), weight in zip(calls, weights, strict=True)
        if len(call.tokens) and (kl_coef > 0 or advantage != 0)
    ]
    sequences = [sequence for _, _, sequence in learnt]
    if not share:
        return sequences
    families, first_targets = [index for index, _, _ in learnt], [len(call.context) - 1 for _, call, _ in learnt]
    return share_prefixes(sequences, families, first_targets, share)


def _sequence(call: Call, advantage: float, policy_weight: float, kl_weight: float) -> dict[str, np.ndarray]:
    tokens = np.concatenate([call.context, call.tokens]).astype(np.int32)
    generated = np.arange(1, len(tokens)) >= len(call.context)
    logprobs = np.zeros(len(tokens) - 1, np.float32)
    logprobs[generated] = call.logprobs
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "advantage": (advantage * generated).astype(np.float32),
        "policy_weight": (policy_weight * generated).astype(np.float32),
        "kl_weight": (kl_weight * generated).astype(np.float32),
        "rollout_logprob": logprobs,
    }


def _constraints(call: Call, gate: Gate | None) -> dict[str, np.ndarray]:
    """The call's masks, for each of its target tokens; none for an engine without a gate."""
    if gate is None:
        return {}
    targets, first = len(call.context) + len(call.tokens) - 1, len(call.context) - 1
    bans = np.full(targets, BANS_NOTHING, np.int32)
    allowed = np.zeros((targets, gate.num_choices), np.int32)
    if call.masks is not None:
        bans[first:] = call.masks.bans
        allowed[first:, : call.masks.allowed.shape[1]] = call.masks.allowed + 1
    return {"bans": bans, "allowed": allowed}


def rollout_metrics(scored: Scored, problems: Sequence[Any], tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """What one step's rollouts were like: `evaluation.metrics.summarize` without times, and some figures of training.

    `reward` is the mean of what rollouts earned, `no_signal_groups` the share of groups whose rewards are all equal,
    and `advantage_share` that of the calls which have a share in their rollout's advantage. `entropy` estimates the
    policy's entropy per token, in nats, as -mean log pi of the tokens drawn.
    """
    method, task = config.data.method, task_of(config)
    records = [
        record_rollout(problem, rollout, tokenizer, config.model, method=method, keep_calls=False, task=task)
        for problem, rollout in zip(problems, scored.rollouts, strict=True)
    ]
    summary = summarize(records, seconds=0.0)
    logprobs = [call.logprobs for rollout in scored.rollouts for call in rollout.calls]
    drawn = sum(len(x) for x in logprobs)
    rewards_RG = np.asarray(scored.rewards).reshape(-1, config.grpo.group_size)
    shares = np.concatenate(scored.shares) if scored.shares else np.ones(len(logprobs))
    return {
        "accuracy": float(np.mean(scored.correct)),
        "reward": float(np.mean(rewards_RG)),
        **{name: summary[name] for name in _LOGGED},
        "no_signal_groups": float(np.mean(np.ptp(rewards_RG, axis=1) == 0)),
        "entropy": -float(sum(np.sum(x, dtype=np.float64) for x in logprobs)) / max(drawn, 1),
        "calls": len(logprobs),
        "advantage_share": float(np.mean(shares > 0)) if len(shares) else 0.0,
    }


def gap_metrics(trainer_logprobs: np.ndarray, rollout_logprobs: np.ndarray) -> dict[str, float]:
    """How far the trainer's log-probabilities of the drawn tokens [N] are from the engine's."""
    if not len(trainer_logprobs):
        return {"logp_diff_mean": 0.0, "logp_diff_max": 0.0, "probs_pearson_corr": 1.0}
    trainer, rollout = trainer_logprobs.astype(np.float64), rollout_logprobs.astype(np.float64)
    difference = np.abs(trainer - rollout)
    centred = [np.exp(x) - np.exp(x).mean() for x in (trainer, rollout)]
    scale = float(np.sqrt(np.sum(centred[0] ** 2) * np.sum(centred[1] ** 2)))
    return {
        "logp_diff_mean": float(difference.mean()),
        "logp_diff_max": float(difference.max()),
        "probs_pearson_corr": float(np.sum(centred[0] * centred[1])) / scale if scale > 0 else 1.0,
    }


def truncated_share(trainer_logprobs: np.ndarray, rollout_logprobs: np.ndarray, importance_cap: float) -> float:
    """The share of drawn tokens whose importance weight exp(trainer - rollout) is above the cap; 0 without a cap."""
    if not len(trainer_logprobs) or importance_cap <= 0:
        return 0.0
    gap = trainer_logprobs.astype(np.float64) - rollout_logprobs.astype(np.float64)
    return float(np.mean(gap > np.log(importance_cap)))
