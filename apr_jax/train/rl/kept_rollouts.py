"""Some of the rollouts that a step of GRPO learnt from, with their advantages, for the report's thread viewer."""

from typing import Any

from apr_jax.config import Config
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.evaluation.metrics import record_rollout
from apr_jax.tasks import task_of
from apr_jax.train.rl.sample import Sample, with_signal

_MOST = 8  # rollouts of a step


def kept_records(sample: Sample, config: Config, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return records (evaluation/metrics.py) of the step's first group with a signal, or of its first group.

    Each call has the `advantage` that its tokens were trained with, and each record its `sample` in the group and its
    `reward`.
    """
    size, method, task = config.grpo.group_size, config.data.method, task_of(config)
    records = []
    for scored in (with_signal(sample.drawn, size) or sample.drawn)[: min(size, _MOST)]:
        rollout = scored.rollout
        record = record_rollout(
            scored.problem, rollout, tokenizer, config.model, method=method, keep_calls=True, task=task
        )
        for call, share in zip(record["calls"], scored.shares.tolist(), strict=True):
            call["advantage"] = scored.advantage * share
        records.append({**record, "sample": rollout.key.sample % size, "reward": scored.reward})
    return records
