"""Solve one problem before your eyes. Of Countdown: the target, then the numbers.

    python launch/solve.py 27 22 26 31 53           # the newest run in runs/, before there is one the shipped policy
    python launch/solve.py 27 3 9 18 --checkpoint=runs/laptop/best --temperature=0.5 --seed=1
    python launch/solve.py 27 3 9 18 --method=serial --checkpoint=runs/serial
    python launch/solve.py '[3+4]*5' --checkpoint=runs/nested_sums # another task writes problems in its own way
    python launch/solve.py 27 3 9 18 --json=-                      # one JSON object on standard output

Threads are drawn on standard error, live on a terminal and as plain lines elsewhere; the verified answer goes to
standard output. A policy brings its configuration; --config=FILE and --config.a.b=c are those of launch/evaluate.py.
Exit codes: 0 done, solved or not; 1 failed; 2 bad arguments or config; 75 stopped by a signal.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.evaluation.rollout_sources import (
    check_method_flag,
    choose_policy,
    define_checkpoint,
    policy_task,
    read_problem_words,
)
from apr_jax.progress import busy
from apr_jax.reasoning.sampling import innermost
from apr_jax.tasks.base import Task

if TYPE_CHECKING:
    from apr_jax.library import Policy, Solution

_CONFIG = entry.define_config("grpo.py")
_CHECKPOINT = define_checkpoint()
_METHOD = flags.DEFINE_string("method", None, "Way of reasoning [the one that the policy was trained for].")
_TEMPERATURE = entry.define_number("temperature", 0.0, "0 is greedy.", low=0.0)
_SEED = entry.define_number("seed", 0, "Seed of the sampling; unused at temperature 0.", low=0)
_BUDGET = entry.define_number("budget", None, "Named in prompts: children, or tokens for serial.", low=1)
_JSON = entry.JsonFlag("the result")


def main(words: Sequence[str]) -> None:
    began = time.perf_counter()
    # What can be refused is refused at once, before JAX and its friends have loaded.
    checkpoint, config = choose_policy(_CHECKPOINT.value, _CONFIG.values())
    task = policy_task(checkpoint, config, is_given=_CONFIG.is_given)
    problem = read_problem_words(task, words)
    if _METHOD.value:
        check_method_flag(_METHOD.value, task, _TEMPERATURE.value, _BUDGET.value)
    with busy("Loading libraries"):
        from apr_jax import library

    given = _CONFIG.config_dict()
    with busy("Reading the policy"):
        policy = library.load(
            checkpoint, config=given if _CONFIG.is_given else None, fallback=given, overrides=_CONFIG.overrides
        )
    method = _METHOD.value or policy.config.data.method
    check_method_flag(method, policy.task, _TEMPERATURE.value, _BUDGET.value)
    _warn(problem, policy)
    with busy("Compiling the engine"):
        policy.engine_for(method)
    started = time.perf_counter()
    solution = _solve(problem, policy)
    _report(policy, solution, checkpoint, start_ms=(started - began) * 1e3)


def _warn(problem: Any, policy: "Policy") -> None:
    """Tell the user what the policy was not trained for. Raise ConfigError for a problem that it cannot even read."""
    trained = policy.config.data.method
    try:
        policy.tokenizer.encode(policy.task.dialects[trained].opening(problem))
    except ValueError as error:
        raise ConfigError(f"the policy's tokenizer cannot spell this problem: {error}") from error
    unlike = policy.task.departures(problem, policy.config.task)
    if _METHOD.value and innermost(_METHOD.value) != trained:
        unlike.append(f"--method={_METHOD.value} instead of {trained}")
    if unlike:
        print(f"The policy was not trained for this: {', '.join(unlike)}.", file=sys.stderr)


def _solve(problem: Any, policy: "Policy") -> "Solution":
    from apr_jax.evaluation.live import LiveThreads

    with LiveThreads(policy.task, policy.tokenizer) as live:
        (solution,) = policy.solve(
            [problem],
            method=_METHOD.value,
            temperature=_TEMPERATURE.value,
            seed=_SEED.value,
            budget=_BUDGET.value,
            observer=live,
        )
    return solution


def _report(policy: "Policy", solution: "Solution", checkpoint: pathlib.Path, start_ms: float) -> None:
    problem = solution.problem
    solvable = policy.task.is_solvable(problem)
    calls = solution.rollout.calls
    first_token_ms = min((call.first_token_ms for call in calls), default=0.0)
    result = {
        "solved": solution.solved,
        "expression": solution.expression,
        "solvable": solvable,
        "start_ms": start_ms,
        "first_token_ms": first_token_ms,
        "temperature": _TEMPERATURE.value,
        "seed": _SEED.value,
        "checkpoint": str(checkpoint),
    }
    _JSON.write(solution.record | result)
    print(_verdict(policy.task, solution, solvable))
    one_after_the_other = f"{solution.sequential_tokens:,} of them one after the other"
    print(f"tokens  {solution.total_tokens:,}, {one_after_the_other}; {solution.num_threads} threads")
    print(f"time    {solution.latency_ms / 1e3:.2f} s, the first token after {first_token_ms / 1e3:.2f} s")
    print(f"start   {start_ms / 1e3:.1f} s for libraries, weights and compilation")


def _verdict(task: Task, solution: "Solution", solvable: bool | None) -> str:
    if solution.solved:
        return task.equation(str(solution.expression), solution.problem)
    why = solution.reason.replace("_", " ")
    there_is = {True: "there is a solution", False: "and there is none", None: "whether there is one is not known"}
    return f"not solved: {why}; {there_is[solvable]}"


if __name__ == "__main__":
    entry.run_with_words(main)
