"""Some of the rollouts that a step of GRPO learnt from, with their advantages, for the report's thread viewer."""

import pathlib
from typing import Any

from apr_jax.config import Config
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.evaluation.metrics import record_rollout
from apr_jax.files import write_jsonl
from apr_jax.tasks import task_of
from apr_jax.train.rl.dynamic_sampling import Sample

_MOST = 8  # rollouts of a step


def keep_rollouts(workdir: pathlib.Path, step: int, sample: Sample, config: Config, tokenizer: Tokenizer) -> None:
    """Writes WORKDIR/grpo_rollouts/STEP.jsonl: a group's records (evaluation/metrics.py), with their calls.

    Each call has the `advantage` that its tokens were trained with, and each record its `sample` in the group and its
    `reward`. The group is the step's first that has a signal; the first, where none has.
    """
    write_jsonl(workdir / "grpo_rollouts" / f"{step}.jsonl", kept_records(sample, config, tokenizer))


def kept_records(sample: Sample, config: Config, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The records that `keep_rollouts` writes."""
    scored, size = sample.scored, config.grpo.group_size
    groups = range(0, len(scored.rollouts), size)
    first = next((begin for begin in groups if scored.advantages[begin : begin + size].any()), 0)
    records = []
    for index in range(first, first + min(size, _MOST)):
        rollout = scored.rollouts[index]
        record = record_rollout(
            sample.asked[index],
            rollout,
            tokenizer,
            config.model,
            method=config.data.method,
            keep_calls=True,
            task=task_of(config),
        )
        shares = scored.shares[index].tolist() if scored.shares else [1.0] * len(rollout.calls)
        for call, share in zip(record["calls"], shares, strict=True):
            call["advantage"] = float(scored.advantages[index]) * share
        records.append({**record, "sample": rollout.key.sample, "reward": scored.rewards[index]})
    return records
