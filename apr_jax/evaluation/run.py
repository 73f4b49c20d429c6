"""Evaluating a policy on a set of problems."""

import itertools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

from apr_jax.config import Config, ConfigError, ModelConfig
from apr_jax.engine.threads import Program, Progress, Rollout, RolloutKey
from apr_jax.evaluation.metrics import record_rollout, summarize
from apr_jax.files import write_jsonl
from apr_jax.paths import path_of
from apr_jax.progress import progress
from apr_jax.reasoning.base import Settings
from apr_jax.reasoning.programs import check_method, make_program
from apr_jax.tasks.base import Split, split_size
from apr_jax.tasks.generation import generate_problems

Record = dict[str, Any]


class RunsPrograms(Protocol):
    """The part of an engine that evaluation needs (`engine.engine.Engine`)."""

    @property
    def model(self) -> ModelConfig: ...

    def run(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        *,
        seed: int,
        temperature: float,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Rollout]: ...


def evaluate(
    engine: RunsPrograms,
    problems: Sequence[Any],
    *,
    method: str,
    settings: Settings,
    seed: int,
    temperature: float,
    on_progress: Callable[[Progress], None] | None = None,
    keep_calls: int = 16,
    at_once: int | None = None,
) -> tuple[dict[str, Any], list[Record]]:
    """Decode each problem once and return the summary and one record a problem (evaluation/metrics.py).

    Args:
      engine: holds the policy's weights.
      method: as `reasoning.programs.make_program` takes it.
      seed, temperature: of the sampling; temperature 0 is greedy.
      keep_calls: the first so many records keep their threads' text, for `save_rollouts`.
      at_once: problems that are decoded at once; None: as many as the lanes take. With 1 a problem's latency is that of
        its own threads. Rollouts are the same.
    Raises: ValueError for no problems, and as `check_method` for `method` with its temperature and budget.
    """
    if not problems:
        raise ValueError("nothing to evaluate: no problems")
    tokenizer, task = settings.tokenizer, settings.task
    check_method(method, task, temperature, budget=settings.budget)
    programs = [
        (RolloutKey(problem=index, sample=0), make_program(method, problem, settings))
        for index, problem in enumerate(problems)
    ]
    start = time.perf_counter()
    size = at_once or len(programs)
    rollouts: list[Rollout] = []
    written = 0  # tokens of these

    def tell(now: Progress) -> None:
        assert on_progress is not None
        finished, tokens = len(rollouts) + now.finished, written + now.generated_tokens
        on_progress(Progress(finished, len(programs), tokens, time.perf_counter() - start))

    shown = None if on_progress is None else tell
    for first in range(0, len(programs), size):
        part = programs[first : first + size]
        rollouts += engine.run(part, seed=seed, temperature=temperature, on_progress=shown)
        written += sum(rollout.generated_tokens for rollout in rollouts[first:])
    seconds = time.perf_counter() - start
    records = [
        record_rollout(
            problem, rollout, tokenizer, engine.model, method=method, keep_calls=index < keep_calls, task=task
        )
        for index, (problem, rollout) in enumerate(zip(problems, rollouts, strict=True))
    ]
    return summarize(records, seconds), records


class ShownProgress:
    """An `on_progress` for Engine.run that draws it. Use as a context manager."""

    def __init__(self, total: int, desc: str = "Evaluate", stream: TextIO | None = None) -> None:
        self._bar = progress(total=total, desc=desc, unit="rollout", stream=stream)

    def __call__(self, now: Progress) -> None:
        values = {"tokens": now.generated_tokens, "tokens_per_second": now.tokens_per_second}
        self._bar.update(now.finished - self._bar.done, **values)

    def __enter__(self) -> "ShownProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.__exit__(kind, *rest)


def load_problems(config: Config, split: Split, limit: int) -> list[Any]:
    """Draw the first `limit` problems of a split, which are those of its demonstrations.

    Raises ConfigError where the split has fewer, and as `draw_splits`.
    """
    size = split_size(config.data, split)
    if limit > size:
        raise ConfigError(f"evaluation.num_problems={limit} is more than the {size} problems of {split}")
    return list(itertools.islice(generate_problems(config, split), limit))


def save_rollouts(path: str | pathlib.Path, records: Mapping[str, Sequence[Record]]) -> None:
    """Write the records that kept their calls, one JSON object a line, each with its key as "label".

    The report draws them: `save_rollouts(workdir / "rollouts.jsonl", {"before": records, "after": records})`.
    """
    kept = [
        {"label": label, **record} for label, labelled in records.items() for record in labelled if "calls" in record
    ]
    write_jsonl(path_of(path), kept)


def show_summary(summary: Mapping[str, Any]) -> str:
    """Return the summary for people, some lines of text."""
    low, high = 100 * summary["accuracy_low"], 100 * summary["accuracy_high"]
    lines = [
        f"solved          {100 * summary['accuracy']:.1f} % of {summary['num_problems']:,} problems "
        f"(95 %: {low:.1f} to {high:.1f})",
        f"tokens          {summary['total_tokens']:,.0f} a problem, {summary['sequential_tokens']:,.0f} of them one "
        f"after the other; {summary['tokens_per_call']:.0f} a call",
        f"computed        {summary['flops']:.3g} FLOPs, {summary['prefilled_tokens']:,.0f} tokens prefilled; "
        f"a problem's longest thread holds {summary['peak_context']:,.0f}",
        f"children        {summary['children_per_rollout']:.1f} a problem, {summary['children_per_spawn']:.1f} a spawn",
        f"malformed       {_share_and_reasons(summary['malformed_rate'], summary['malformed_reasons'])}",
        f"cut off         {_share_and_reasons(summary['truncated_rate'], summary['truncated_reasons'])}",
        f"not solved      {_share_and_reasons(1 - summary['accuracy'], summary['failures'])}",
        f"children failed {_share_and_reasons(summary['child_failure_rate'], summary['child_reasons'])}",
        f"a child had it  {100 * summary['child_solved_rate']:.1f} % of problems",
        f"operations      {100 * summary['operations_right_rate']:.1f} % of those written are right",
        f"speed           {summary['tokens_per_second']:,.0f} tokens/s, {summary['latency_ms']:,.0f} ms a problem",
    ]
    if "strict_accuracy" in summary:
        lines.append(
            f"read strictly   {100 * summary['strict_accuracy']:.1f} % solved; not "
            f"{_share_and_reasons(1 - summary['strict_accuracy'], summary['strict_failures'])}"
        )
    if "pass_at_k" in summary:
        names = {"cons_at_k": "the majority", "best_at_k": "the likeliest", "pass_at_k": "any"}
        ends = [f"{who} in {100 * summary[name][-1]:.1f} %" for name, who in names.items() if name in summary]
        alone = f"one alone is right in {100 * summary['pass_at_k'][0]:.1f} % of problems"
        lines.append(f"samples         {len(summary['pass_at_k'])}: {alone}, {', '.join(ends)}")
    return "\n".join(lines)


def _share_and_reasons(share: float, reasons: Mapping[str, int]) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    return f"{100 * share:.1f} %" + (f" ({counts})" if counts else "")
