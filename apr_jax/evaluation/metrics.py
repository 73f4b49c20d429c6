"""From rollouts to figures: one record a problem, one summary a set.

A record is a plain dict, ready for JSON. Other programs read the summary's keys in `launch/evaluate.py --json`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.config import ModelConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Call, Rollout, StopReason
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.base import Outcome, Sample
from apr_jax.reasoning.sampling import CHOICES, innermost
from apr_jax.tasks.base import Task, ThreadText

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % two-sided. Raises ValueError for what is no share."""
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"no share of {successes} in {total}")
    share, z2 = successes / total, Z95**2
    centre = share + z2 / (2 * total)
    spread = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low, high = (centre - spread) / (1 + z2 / total), (centre + spread) / (1 + z2 / total)
    return (0.0 if successes == 0 else low), (1.0 if successes == total else high)


def record_rollout(
    problem: Any,
    rollout: Rollout,
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    method: str,
    keep_calls: bool,
    task: Task,
) -> dict[str, Any]:
    """Return one problem's record. With `keep_calls` also its "calls" and "threads", for the thread viewer.

    `total_tokens` and `generated_tokens` are the same: tokens that all threads wrote, each once. `sequential_tokens` is
    the longest causal chain, `peak_context` what the longest thread held (`Rollout.peak_context`). These depend on no
    schedule; `prefilled_tokens` and `flops` (`engine.work.Work`, of this `model`) and `latency_ms` are as measured.
    """
    outcome: Outcome = rollout.result
    verdict = task.verify(outcome.answer, problem)
    texts = [tokenizer.decode(_without_end(call.tokens.tolist(), tokenizer)) for call in rollout.calls]
    contexts = [tokenizer.decode(call.context.tolist()) if task.counts_by_context else "" for call in rollout.calls]
    counts = [task.count_operations(text, context) for text, context in zip(texts, contexts, strict=True)]
    record: dict[str, Any] = {
        "problem": rollout.key.problem,
        **task.describe(problem),
        "method": method,
        "correct": verdict.correct,
        "verdict": verdict.reason if outcome.status == "answered" else outcome.reason,
        "status": outcome.status,
        "reason": outcome.reason,
        "answer": outcome.answer,
        "total_tokens": rollout.generated_tokens,
        "generated_tokens": rollout.generated_tokens,
        "sequential_tokens": rollout.sequential_tokens,
        "prefilled_tokens": rollout.work.prefilled,
        "peak_context": rollout.peak_context,
        "flops": rollout.work.flops(model),
        "num_threads": rollout.num_threads,
        "num_calls": len(rollout.calls),
        "num_spawns": outcome.num_spawns,
        "num_children": outcome.num_children,
        "depth": max((len(call.path) // 2 for call in rollout.calls), default=0),
        "child_reasons": list(outcome.child_reasons),
        "dropped_lines": list(outcome.dropped_lines),
        "child_solved": any(task.path_solves(path, problem) for path in outcome.child_paths),
        "operations": sum(written for written, _ in counts),
        "operations_right": sum(right for _, right in counts),
        "latency_ms": rollout.latency_ms,
    }
    if task.reads_leniently:
        verdict = task.read_strictly(problem, _thread_texts(rollout.calls, tokenizer))
        record |= {"strict_correct": verdict.correct, "strict_verdict": verdict.reason}
    if outcome.samples:
        record |= _sample_figures(outcome.samples, rollout.calls, problem, task)
    if keep_calls:
        record["calls"] = _call_records(rollout.calls, texts, tokenizer)
        record["threads"] = _threads(rollout.calls, record, problem, tokenizer, task)
    return record


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate, without bias, the chance that one of k samples is right, from n samples of which c are.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374), equation 1. Raises ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"no pass@{k} of {num_samples} samples, {num_correct} of them right")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _sample_figures(samples: Sequence[Sample], calls: Sequence[Call], problem: Any, task: Task) -> dict[str, Any]:
    """Return each sample, and what fewer would have given: entry k - 1 of a list is of k of them.

    `pass_at_k` is an estimate from all samples. `cons_at_k` and `best_at_k` are 1 where what the first k choose is
    right, and `tokens_at_k` is what these k wrote. Without likelihoods (of roots that write nothing) there is no
    `best_at_k`.
    """
    correct = [task.verify(sample.answer, problem).correct for sample in samples]
    tokens = [sum(len(call.tokens) for call in calls if call.path[:2] == (0, index)) for index in range(len(samples))]
    counts = range(1, len(samples) + 1)
    figures = {
        "samples": [
            {**dataclasses.asdict(sample), "correct": right, "tokens": written}
            for sample, right, written in zip(samples, correct, tokens, strict=True)
        ],
        "pass_at_k": [pass_at_k(len(samples), sum(correct), k) for k in counts],
        "cons_at_k": [float(correct[CHOICES["cons"](samples[:k], problem, task)]) for k in counts],
        "tokens_at_k": [sum(tokens[:k]) for k in counts],
    }
    if all(sample.mean_logprob is not None for sample in samples if sample.answer is not None):
        figures["best_at_k"] = [float(correct[CHOICES["best"](samples[:k], problem, task)]) for k in counts]
    return figures


def summarize(records: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the figures of a set of records that took `seconds` of wall time.

    Rates are shares of problems unless named `child_`: those are shares of children. Token counts, `flops`,
    `latency_ms`, `threads_per_rollout` and `spawn_depth` (levels of threads below the root) are means per problem;
    `peak_context_max` is the largest. Where records have samples, `pass_at_k`, `cons_at_k`, `best_at_k` and
    `tokens_at_k` are lists of means, entry k - 1 of k samples. Raises ValueError for no records.
    """
    total = len(records)
    if not total:
        raise ValueError("nothing to summarize: no records")

    def mean(key: str) -> float:
        return float(sum(record[key] for record in records)) / total

    def share(successes: float, of: float) -> float:
        return successes / of if of else 0.0

    correct = sum(record["correct"] for record in records)
    low, high = wilson_interval(correct, total)
    children = sum(record["num_children"] for record in records)
    tokens = sum(record["total_tokens"] for record in records)
    statuses = Counter(record["status"] for record in records)
    child_reasons = Counter(reason for record in records for reason in record["child_reasons"])
    return {
        "accuracy": correct / total,
        "accuracy_low": low,
        "accuracy_high": high,
        "num_problems": total,
        "total_tokens": tokens / total,
        "sequential_tokens": mean("sequential_tokens"),
        "generated_tokens": mean("generated_tokens"),
        "prefilled_tokens": mean("prefilled_tokens"),
        "peak_context": mean("peak_context"),
        "peak_context_max": max(record["peak_context"] for record in records),
        "flops": mean("flops"),
        "threads_per_rollout": mean("num_threads"),
        "tokens_per_call": share(tokens, sum(record["num_calls"] for record in records)),
        "children_per_rollout": children / total,
        "children_per_spawn": share(children, sum(record["num_spawns"] for record in records)),
        "spawn_depth": mean("depth"),
        "malformed_rate": statuses["malformed"] / total,
        "truncated_rate": statuses["truncated"] / total,
        "malformed_reasons": _counted(r["reason"] for r in records if r["status"] == "malformed"),
        "truncated_reasons": _counted(r["reason"] for r in records if r["status"] == "truncated"),
        "failures": _counted(r["verdict"] for r in records if not r["correct"]),
        "child_failure_rate": share(sum(child_reasons.values()), children),
        "child_reasons": _counted(child_reasons.elements()),
        "dropped_lines": _counted(reason for record in records for reason in record["dropped_lines"]),
        "child_solved_rate": mean("child_solved"),
        "child_solved_but_wrong_rate": sum(r["child_solved"] and not r["correct"] for r in records) / total,
        "operations_right_rate": share(
            sum(r["operations_right"] for r in records), sum(r["operations"] for r in records)
        ),
        "latency_ms": mean("latency_ms"),
        "tokens_per_second": share(tokens, seconds) if seconds > 0 else 0.0,
        "seconds": seconds,
        **_means_at_k(records),
        **_strict_figures(records),
    }


def _strict_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a task's strict reading says of rollouts that were read leniently; nothing where it has but one."""
    if not all("strict_correct" in record for record in records):
        return {}
    return {
        "strict_accuracy": sum(record["strict_correct"] for record in records) / len(records),
        "strict_failures": _counted(r["strict_verdict"] for r in records if not r["strict_correct"]),
    }


def _means_at_k(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Average what records tell of their first k samples; nothing where they have none, or not equally many."""
    if len({len(record.get("samples", ())) for record in records}) > 1 or "samples" not in records[0]:
        return {}
    names = [name for name in records[0] if name.endswith("_at_k") and all(name in record for record in records)]
    return {
        name: [sum(column) / len(records) for column in zip(*(record[name] for record in records), strict=True)]
        for name in names
    }


def _counted(reasons: Any) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0])))


def _call_records(calls: Sequence[Call], texts: Sequence[str], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return what the thread viewer reads of each call; `texts` is what each wrote."""
    return [
        {
            "path": list(call.path),
            "context": tokenizer.decode(call.context.tolist()[1:]),
            "text": text,
            "tokens": tokenizer.token_texts(call.tokens.tolist()),
            "logprobs": [round(logprob, 4) for logprob in call.logprobs.tolist()],
            "stop": call.stop.reason.name.lower(),
            "num_tokens": len(call.tokens),
            "clock_start": call.clock_start,
            "start_ms": call.start_ms,
            "end_ms": call.end_ms,
        }
        for call, text in zip(calls, texts, strict=True)
    ]


def _without_end(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in tokenizer.eos_ids else tokens


def _thread_texts(calls: Sequence[Call], tokenizer: Tokenizer) -> list[ThreadText]:
    last = {call.path: index for index, call in enumerate(calls)}
    return [
        ThreadText(
            text=tokenizer.decode([*call.context.tolist(), *call.tokens.tolist()]),
            depth=len(call.path) // 2,
            ended=call.stop.token == tokenizer.eos_id,
            is_last=last[call.path] == index,
        )
        for index, call in enumerate(calls)
    ]


def _threads(
    calls: Sequence[Call], record: Mapping[str, Any], problem: Any, tokenizer: Tokenizer, task: Task
) -> list[dict[str, Any]]:
    """Say how each thread ended: the root by its verdict, a child as cancelled, truncated, malformed or by its dialect.

    Children of a program that is no method are read by the task's first dialect.
    """
    last = {call.path: call for call in calls}
    method = METHODS.get(innermost(record["method"]))
    dialect = next(iter(task.dialects.values())) if method is None else task.dialects[method.dialect]
    threads = []
    for path, call in last.items():
        if not path:
            result = record["verdict"]
        elif call.stop.reason is StopReason.CANCELLED:
            result = "cancelled"
        elif call.stop.reason is StopReason.STRING or call.stop.token not in (None, *tokenizer.eos_ids):
            result = "malformed"
        elif call.stop.reason is not StopReason.TOKEN:
            result = "truncated"
        else:
            context, completion = (
                tokenizer.decode(call.context.tolist()[1:]),
                tokenizer.decode(call.tokens.tolist()[:-1]),
            )
            result = dialect.child_result(context, completion, problem)
        threads.append({"path": list(path), "result": result})
    return threads
