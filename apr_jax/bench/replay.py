"""Adaptive parallel reasoning as a workload: real problems, their solver's spawns and joins, any model.

A replay opens, decodes, spawns, joins, truncates and appends as a policy that writes the demonstration would, but its
tokens are whatever the model draws. Speed depends on lengths only, so every model can be measured on the same work,
even a random one.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apr_jax.config import Config, ConfigError
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Append, Decode, Join, Open, Program, Progress, Rollout, RolloutKey, Spawn, Truncate
from apr_jax.tasks.base import Call, Demonstration
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.dialect import SpawnCall
from apr_jax.tasks.generation import demonstrate, generate_problems

MAX_PROBLEMS = 256  # where no number is asked for


@dataclasses.dataclass(frozen=True)
class ReplayedCall:
    """One call of a thread."""

    context: list[int]  # all tokens before it
    tokens: list[int]  # what the solver wrote: a replay writes as many
    children: tuple["ReplayedCall", ...]  # the only calls of the children that it ends by spawning


def read_calls(demonstration: Demonstration, tokenizer: Tokenizer) -> list[ReplayedCall]:
    """Return the parent's calls, each with the children that it spawns."""
    children = iter([call for call in demonstration.calls if call.depth == 1])

    def read(call: Call) -> ReplayedCall:
        end = [] if call.ends_in_spawn else [tokenizer.eos_id]
        spawn = ADAPTIVE.read_spawn(call.context + call.completion)
        spawned = len(spawn.contexts) if isinstance(spawn, SpawnCall) else 0
        return ReplayedCall(
            context=tokenizer.encode_prompt(call.context),
            tokens=[*tokenizer.encode(call.completion), *end],
            children=tuple(read(next(children)) for _ in range(spawned)),
        )

    return [read(call) for call in demonstration.calls if call.depth == 0]


def replay(calls: Sequence[ReplayedCall]) -> Program:
    """Run a program that does what a thread's calls did, and its children's."""
    thread = yield Open(calls[0].context)
    yield Decode(thread, (), max_tokens=len(calls[0].tokens))
    for before, call in itertools.pairwise(calls):
        handle = yield Spawn([replay([child]) for child in before.children])
        yield Join(handle)
        kept = _common_prefix([*before.context, *before.tokens], call.context)
        yield Truncate(thread, kept)
        yield Append(thread, call.context[kept:])
        yield Decode(thread, (), max_tokens=len(call.tokens))


def make_replays(config: Config, tokenizer: Tokenizer, count: int | None, lanes: int = 0) -> list[list[ReplayedCall]]:
    """Return the parent's calls of the solver's search on the first `count` test problems that fit the limits.

    With `count` None there are as many as the split has, up to MAX_PROBLEMS, or two for each of `lanes`. Raises
    ConfigError when the test split has fewer than asked for.
    """
    wanted = max(MAX_PROBLEMS, 2 * lanes) if count is None else count

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    replays: list[list[ReplayedCall]] = []
    for index, problem in enumerate(generate_problems(config, "test")):
        if len(replays) == wanted:
            break
        rng = random.Random(f"{config.seed}/replay/{index}")
        calls = read_calls(
            demonstrate(problem, rng, config.task, "adaptive", config.data.condition_on_budget, count_tokens),
            tokenizer,
        )
        if _fits(calls, config):
            replays.append(calls)
    if not replays or len(replays) < (count or 0):
        raise ConfigError(
            f"{wanted} problems asked for, and data.num_test={config.data.num_test} gives {len(replays)} that fit "
            f"model.max_seq_len={config.model.max_seq_len} and rollout.max_steps={config.rollout.max_steps}"
        )
    return replays


def _fits(calls: Sequence[ReplayedCall], config: Config) -> bool:
    """Return True where all threads stay within `model.max_seq_len` and `rollout.max_steps`."""
    threads = [calls, *([child] for call in calls for child in call.children)]
    longest = max(len(call.context) + len(call.tokens) for thread in threads for call in thread)
    most = max(sum(len(call.tokens) for call in thread) for thread in threads)
    return longest <= config.model.max_seq_len and most <= config.rollout.max_steps


def benchmark_replays(
    engine: Engine, replays: Sequence[Sequence[ReplayedCall]], seed: int, on_progress: Callable[[Progress], None] | None
) -> dict[str, Any]:
    """Run the replays to their end on a warm engine, and report how well it was used.

    Times are in ms, as mean, median and 99th percentile: over calls `ttft`, from the request to the first token known
    to the host (queueing and prefill included), and `tpot`, the call's time per token; over rollouts `e2e`. Tokens
    reach the host in visits, so the time of the first token is that of its visit.
    """
    programs = [(RolloutKey(number, 0), replay(calls)) for number, calls in enumerate(replays)]
    rollouts = engine.run(programs, seed=seed, temperature=1.0, on_progress=on_progress)
    stats = engine.stats
    return {
        "problems": len(rollouts),
        "children_per_problem": float(np.mean([sum(len(c.children) for c in calls) for calls in replays])),
        "generated_tokens": stats.generated,
        "seconds": stats.seconds,
        "output_tokens_per_second": stats.generated / stats.seconds,
        "lane_occupancy": stats.lane_occupancy,
        "host_share": stats.host_share,
        "prefilled_per_generated": stats.prefilled / stats.generated,
        "reused_per_generated": stats.reused / stats.generated,
        "cache_waste": stats.cache_waste,
        "preemptions": stats.preemptions,
        "compilations": stats.compilations,
        **_latencies(rollouts),
    }


def show(figures: dict[str, Any]) -> str:
    """Write the figures of `benchmark_replays` for people."""
    ttft, tpot = figures["ttft_ms"], figures["tpot_ms"]
    return (
        f"{figures['problems']} problems with {figures['children_per_problem']:.1f} children each: "
        f"{figures['output_tokens_per_second']:,.0f} output tokens/s\n"
        f"lanes occupied {figures['lane_occupancy']:.1%}, device waited for host {figures['host_share']:.1%}, "
        f"prefilled per generated token {figures['prefilled_per_generated']:.2f} "
        f"(reused {figures['reused_per_generated']:.2f}), cache wasted {figures['cache_waste']:.1%}, "
        f"{figures['preemptions']} preemptions\n"
        f"TTFT {ttft['median']:.0f} ms (P99 {ttft['p99']:.0f}), TPOT {tpot['median']:.1f} ms (P99 {tpot['p99']:.1f})"
    )


def _latencies(rollouts: Sequence[Rollout]) -> dict[str, dict[str, float]]:
    calls = [call for rollout in rollouts for call in rollout.calls]
    return {
        "ttft_ms": _spread([call.first_token_ms - call.start_ms for call in calls]),
        "tpot_ms": _spread([(call.end_ms - call.start_ms) / len(call.tokens) for call in calls]),
        "e2e_ms": _spread([rollout.latency_ms for rollout in rollouts]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
    }


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
