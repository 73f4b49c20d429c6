"""Direct answers on Countdown: the winning path alone, without the search that found it.

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
from collections.abc import Sequence

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import Ending, ThreadDialect


class Direct(ThreadDialect):
    """The winning path alone."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return trace.root_prompt(problem)

    def read_ending(self, text: str) -> Ending:
        if not rules.claims_goal(text):
            return Ending(None, "malformed", "unfinished")
        return Ending(text.strip(), "answered", "")

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        path, _, reason = self.read_ending(context + completion)
        return reason or ("solved" if rules.verify(path, problem).correct else "wrong_path")

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: CountdownConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Return the prompt and a solution of the problem, found by going through all of them.

        With `section.shuffle` each step is drawn from all that lead to a solution, else it is the first of them in the
        order in which operations are generated. Raises ValueError for a problem without one.
        """
        numbers, operations, node_id = list(problem.numbers), "", trace.ROOT_ID
        lines = []
        while len(numbers) > 1:
            result, operation, numbers = _step(numbers, problem.target, rng if section.shuffle else None)
            if len(numbers) == 1:
                lines.append(trace.final_lines(problem.target, result, operation))
                break
            node_id += ",0"
            operations += f"{', ' if operations else ''}'{operation}'"
            lines.append(trace.generated_lines(node_id, problem.target, numbers, operation))
            lines.append(trace.move_line(node_id) + trace.state_line(problem.target, numbers, operations))
        completion = "".join(lines)
        return (Call(self.prompt(problem), completion, 0, False, len(completion)),)


def _step(numbers: Sequence[int], target: int, rng: random.Random | None) -> tuple[int, str, list[int]]:
    """Return an operation that keeps the target in reach: its result, its text, and the numbers then left."""
    steps = list(rules.steps(numbers))
    if rng is not None:
        rng.shuffle(steps)
    for result, operation, left in steps:
        if left == [target] or (len(left) > 1 and rules.is_solvable(left, target)):
            return result, operation, left
    raise ValueError(f"{target} cannot be made of {list(numbers)}")


DIRECT = Direct()
