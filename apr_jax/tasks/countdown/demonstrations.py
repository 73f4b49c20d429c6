"""Every method's demonstrations, by name."""

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from apr_jax.tasks.base import Call, Demonstration
from apr_jax.tasks.countdown import direct_traces, hogwild_traces, pasta_traces, rules, solver, thought_traces, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem


class Demonstrator(Protocol):
    """Searches for a solution of `problem`, and returns the search as training sequences (see `demonstrate`)."""

    def __call__(
        self,
        problem: Problem,
        rng: random.Random,
        task: CountdownConfig,
        count_tokens: Callable[[str], int] | None,
        *,
        budget: bool,
    ) -> tuple[Call, ...]: ...


DEMONSTRATORS: Mapping[str, Demonstrator] = MappingProxyType(
    {
        "adaptive": solver.adaptive_calls,
        "direct": direct_traces.direct_calls,
        "hogwild": hogwild_traces.hogwild_calls,
        "pasta": pasta_traces.pasta_calls,
        "serial": solver.serial_calls,
        "tree_of_thoughts": thought_traces.tree_calls,
    }
)
SHARED_METHODS = frozenset({"hogwild"})  # whose calls are workers on one shared cache, side by side


def innermost(method: str) -> str:
    """The way of reasoning that a method's wrappers, if any, sample: `adaptive` of `cons@8:adaptive`."""
    return method.rpartition(":")[2]


def demonstrate(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    method: str,
    condition_on_budget: bool,
    count_tokens: Callable[[str], int] | None = None,
) -> Demonstration:
    """Searches for a solution and returns the search as training sequences, whether or not it found one.

    Args:
      problem: what to solve.
      rng: draws beams, orders and delegations.
      task: the searches' parameters.
      method: a name in DEMONSTRATORS.
      condition_on_budget: name in the prompt what the search took: children opened, or tokens rounded up to a bin.
      count_tokens: tokens of a text; serial budgets, context windows and workers that see each other need it.

    Raises:
      ValueError: an unknown method, a budget where the method has none, or a serial one without `count_tokens`.
    """
    if method not in DEMONSTRATORS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(sorted(DEMONSTRATORS))}")
    calls = DEMONSTRATORS[method](problem, rng, task, count_tokens, budget=condition_on_budget)
    ends = [call.context + call.completion for call in calls if call.depth == 0 and not call.ends_in_spawn]
    if ends:
        read = trace.read_path if method == "direct" else trace.read_answer
        answer = next((answer for answer in map(read, ends) if answer is not None), None)
    else:  # the root writes nothing: its program assembles the answer from what the children wrote
        answer = thought_traces.demonstrated_answer(problem, calls)
    return Demonstration(problem, method, calls, answer, rules.verify(answer, problem).correct)
