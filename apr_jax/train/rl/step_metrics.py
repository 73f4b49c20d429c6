"""The figures of one GRPO step, for metrics.jsonl and timings.jsonl."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from apr_jax.config import Config
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.evaluation.metrics import record_rollout, summarize
from apr_jax.parallel import hosts
from apr_jax.tasks import task_of
from apr_jax.train.rl.advantage import has_signal
from apr_jax.train.rl.sample import Sample
from apr_jax.train.scorer import Batch

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


def sample_metrics(sample: Sample, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe the rollouts of a step: `evaluation.metrics.summarize` without times, and some figures of training.

    `reward` is the mean of what rollouts earned, `no_signal_groups` the share of groups whose rewards are all equal,
    and `advantage_share` that of the calls which have a share in their rollout's advantage. `entropy` estimates the
    policy's entropy per token, in nats, as -mean log pi of the tokens drawn.
    """
    method, task, drawn = config.data.method, task_of(config), sample.drawn
    records = [
        record_rollout(each.problem, each.rollout, tokenizer, config.model, method=method, keep_calls=False, task=task)
        for each in drawn
    ]
    summary = summarize(records, seconds=0.0)
    logprobs = [call.logprobs for each in drawn for call in each.rollout.calls]
    tokens = sum(len(x) for x in logprobs)
    rewards_RG = np.asarray([each.reward for each in drawn]).reshape(-1, config.grpo.group_size)
    shares = np.concatenate([each.shares for each in drawn])
    return {
        "accuracy": float(np.mean([each.correct for each in drawn])),
        "reward": float(np.mean(rewards_RG)),
        **{name: summary[name] for name in _LOGGED},
        "no_signal_groups": float(np.mean(~has_signal(rewards_RG))),
        "entropy": -float(sum(np.sum(x, dtype=np.float64) for x in logprobs)) / max(tokens, 1),
        "calls": len(logprobs),
        "advantage_share": float(np.mean(shares > 0)) if len(shares) else 0.0,
        "rollout_rounds": sample.rounds,
        "dropped_groups": sample.dropped,
    }


def gap_metrics(microbatches: Sequence[Batch], old: Sequence[jax.Array], importance_cap: float) -> dict[str, float]:
    """Compare the trainer's log-probabilities of the generated tokens with the engine's.

    Args:
      old: the trainer's `[B, T]` of each microbatch, before its first update.
      importance_cap: `importance_truncated` is the share of tokens with an importance weight above it; 0: no cap.
    """
    trainer, rollout = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for batch, old_BT in zip(microbatches, old, strict=True):
        generated_BT = hosts.whole_array(batch["policy_weight"]) > 0
        trainer.append(hosts.whole_array(old_BT)[generated_BT])
        rollout.append(hosts.whole_array(batch["rollout_logprob"])[generated_BT])
    return compare_logprobs(np.concatenate(trainer), np.concatenate(rollout), importance_cap)


def compare_logprobs(trainer: np.ndarray, rollout: np.ndarray, importance_cap: float) -> dict[str, float]:
    """Compare two lists of log-probabilities of the same tokens `[N]`, as `gap_metrics`."""
    if not len(trainer):
        return {"logp_diff_mean": 0.0, "logp_diff_max": 0.0, "probs_pearson_corr": 1.0, "importance_truncated": 0.0}
    trainer, rollout = trainer.astype(np.float64), rollout.astype(np.float64)
    difference = np.abs(trainer - rollout)
    centred = [np.exp(x) - np.exp(x).mean() for x in (trainer, rollout)]
    scale = float(np.sqrt(np.sum(centred[0] ** 2) * np.sum(centred[1] ** 2)))
    above = trainer - rollout > np.log(importance_cap) if importance_cap > 0 else np.zeros(1)
    return {
        "logp_diff_mean": float(difference.mean()),
        "logp_diff_max": float(difference.max()),
        "probs_pearson_corr": float(np.sum(centred[0] * centred[1])) / scale if scale > 0 else 1.0,
        "importance_truncated": float(np.mean(above)),
    }


def packing(sequences: Sequence[Mapping[str, np.ndarray]], microbatches: Sequence[Batch]) -> float:
    """Return the share of the batch that is no padding, rows that only fill a microbatch included; 1 for no batch."""
    tokens = sum(len(sequence["tokens"]) for sequence in sequences)
    return tokens / sum(batch["tokens"].size for batch in microbatches) if microbatches else 1.0


def tokens_per_second(samples: Iterable[Sample], seconds: float) -> float:
    """Return the rate at which samples were drawn together."""
    return sum(_generated(sample) for sample in samples) / seconds


def timings(sample: Sample, rate: float, update_seconds: float) -> dict[str, float]:
    """Return a step's times, in seconds, and rates. `rate` is that of `tokens_per_second`: a sample that was drawn
    along with others counts with its share of the time."""
    rollout_seconds = _generated(sample) / max(rate, 1e-9)
    return {
        "seconds": rollout_seconds + update_seconds,
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "rollout_tokens_per_second": rate,
        "latency_ms": sum(each.rollout.latency_ms for each in sample.drawn) / len(sample.drawn),
    }


def _generated(sample: Sample) -> int:
    return sum(len(call.tokens) for each in sample.drawn for call in each.rollout.calls)
