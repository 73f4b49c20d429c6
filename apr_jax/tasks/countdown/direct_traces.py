"""Demonstrations of `direct`: the winning path alone, without the search that found it.

    prompt      Moving to Node #0
                Current State: 24:[2, 3, 4], Operations: []
    completion  Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]
                Generated Node #0,0: 24:[4, 6] Operation: 2*3=6
                Moving to Node #0,0
                Current State: 24:[4, 6], Operations: ['2*3=6']
                Exploring Operation: 4*6=24, Resulting Numbers: [24]
                24,24 equal: Goal Reached

These are the "optimal paths" that Stream of Search compares itself with (Gandhi et al. 2024, arXiv 2404.03683).
Every problem has one, so that no demonstration fails, which those of searches do.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem


def direct_calls(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    count_tokens: Callable[[str], int] | None,
    *,
    budget: bool,
) -> tuple[Call, ...]:
    """Return the prompt and a solution of the problem, found by going through all of them.

    With `task.shuffle` each step is drawn from all that lead to a solution, else it is the first of them in the order
    in which operations are generated. Raises ValueError for a problem without one, and where a budget is asked for.
    """
    if budget:
        raise ValueError("direct does not search, so it has no budget: set data.condition_on_budget=False")
    numbers, operations, node_id = list(problem.numbers), "", trace.ROOT_ID
    lines = []
    while len(numbers) > 1:
        result, operation, numbers = _step(numbers, problem.target, rng if task.shuffle else None)
        if len(numbers) == 1:
            lines.append(trace.final_lines(problem.target, result, operation))
            break
        node_id += ",0"
        operations += f"{', ' if operations else ''}'{operation}'"
        lines.append(trace.generated_lines(node_id, problem.target, numbers, operation))
        lines.append(trace.move_line(node_id) + trace.state_line(problem.target, numbers, operations))
    completion = "".join(lines)
    return (Call(trace.parent_prompt(problem), completion, 0, False, len(completion)),)


def _step(numbers: Sequence[int], target: int, rng: random.Random | None) -> tuple[int, str, list[int]]:
    """Return an operation that keeps the target in reach: its result, its text, and the numbers then left."""
    steps = list(_steps(numbers))
    if rng is not None:
        rng.shuffle(steps)
    for result, operation, left in steps:
        if left == [target] or (len(left) > 1 and rules.is_solvable(left, target)):
            return result, operation, left
    raise ValueError(f"{target} cannot be made of {list(numbers)}")


def _steps(numbers: Sequence[int]) -> Iterator[tuple[int, str, list[int]]]:
    for i in range(len(numbers) - 1):
        for j in range(i + 1, len(numbers)):
            for result, operation in rules.operations(numbers[i], numbers[j]):
                yield result, operation, [*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :], result]
