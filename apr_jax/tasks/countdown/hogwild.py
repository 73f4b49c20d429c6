"""Hogwild! on Countdown: two workers that search one problem in lockstep and see each other's text as it comes.

Both get the prompt of an adaptive thread; a line of its own tells each which one it is. The first tries the operations
on the problem's numbers from the first on, the second from the last on; each is followed at once by all that comes
below it. So nobody repeats what the other has done, and together they have tried everything when they meet:

    <Start Sub Search 0 at level 1> Moving to Node #0          <Start Sub Search 1 at level 1> Moving to Node #0
    Exploring Operation: 3+7=10, Resulting Numbers: [12, 10]   Exploring Operation: 12-7=5, Resulting Numbers: [3, 5]
    Exploring Operation: 12+10=22, Resulting Numbers: [22]     Exploring Operation: 3+5=8, Resulting Numbers: [8]
    22,30 unequal: No Solution                                 8,30 unequal: No Solution
    ...                                                        ...

Who reaches the goal replays its path from the root and has thereby answered. Who sees that the other has reached it
leaves before its next operation (`LEAVE`), and who sees that the other has begun the operation that would be its next
writes "No solution found.". What a worker sees, and when, is `engine/groups.py`'s rule, so a demonstration depends on
how many tokens each line has. All phrases are of the trace grammar (`trace.py`).
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.search import SearchDialect
from apr_jax.tasks.dialect import Ending, WorkerDialect

LEAVE = "Exit Sub Search at level 1\n"


class Hogwild(SearchDialect, WorkerDialect):
    """Two workers that share out the operations."""

    num_workers = 2
    names_budget = False

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return trace.root_prompt(problem)

    def header(self, worker: int) -> str:
        return trace.start_line(worker, 1, trace.ROOT_ID)

    def read_ending(self, text: str) -> Ending:
        return Ending(None, "no_solution", "left") if _has_left(text) else trace.read_ending(text)

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        """Return how a worker ended: as `SearchDialect` says it, or left."""
        text = context + completion
        return "left" if _has_left(text) else super().child_result(context, completion, problem)

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return True

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: CountdownConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Return two workers' calls, one each, searched in lockstep. Nothing is drawn."""
        firsts = list(enumerate(rules.steps(problem.numbers)))
        workers = [_Worker(_search(order, problem.target), n) for n, order in enumerate((firsts, firsts[::-1]))]
        while not all(worker.done for worker in workers):
            # Who is behind moves first, so that all that it can see is known.
            worker = min((each for each in workers if not each.done), key=lambda each: (each.time, each.number))
            _advance(worker, workers[1 - worker.number], problem, count_tokens)
        return tuple(
            Call(self.prompt(problem) + self.header(worker.number), worker.text, 0, False, worker.replay_start)
            for worker in workers
        )


def _has_left(text: str) -> bool:
    """Tell whether a worker ended because another had reached the goal."""
    return text.endswith("\n" + LEAVE) and not rules.claims_goal(text)


@dataclasses.dataclass(frozen=True)
class _Step:
    """The line, or the two, of one operation."""

    text: str
    first: int | None = None  # of an operation on the problem's own numbers: which of them it is
    path: tuple[str, ...] | None = None  # of one that reaches the goal: the lines from the root to it


@dataclasses.dataclass
class _Worker:
    """One worker's text as it grows."""

    steps: Iterator[_Step]
    number: int
    time: int = 0  # tokens written, which is when the last of them is read
    text: str = ""
    begun: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # when each operation can be seen, and which
    goal_time: int | None = None
    replay_start: int = 0
    done: bool = False


def _advance(worker: _Worker, other: _Worker, problem: Problem, count_tokens: CountTokens) -> None:
    """Write the worker's next operation, or its end."""
    step = next(worker.steps, None)
    seen = {first for time, first in other.begun if time <= worker.time}
    replay = ""
    worker.done = True
    if worker.goal_time is None and other.goal_time is not None and other.goal_time <= worker.time:
        worker.text += LEAVE
    elif step is None or step.first in seen:
        worker.text += trace.NO_SOLUTION
    else:
        worker.text += step.text
        worker.time += count_tokens(step.text)
        if step.path is not None:
            worker.goal_time = worker.time
            replay = trace.root_prompt(problem) + "".join(step.path)
        else:
            worker.done = False
            if step.first is not None:
                worker.begun.append((worker.time, step.first))
    worker.replay_start = len(worker.text)
    worker.text += replay


def _search(
    operations: Iterable[tuple[int | None, tuple[int, str, list[int]]]], target: int, path: tuple[str, ...] = ()
) -> Iterator[_Step]:
    """Yield operations (`rules.steps`, each with its number), each followed by those below it, up to the goal."""
    for first, (result, operation, remaining) in operations:
        if len(remaining) > 1:
            line = f"Exploring Operation: {operation}, Resulting Numbers: {remaining}\n"
            yield _Step(line, first)
            below = ((None, step) for step in rules.steps(remaining))
            yield from _search(below, target, (*path, line))
        else:
            text = trace.final_lines(target, result, operation)
            yield _Step(text, first, (*path, text) if result == target else None)


HOGWILD = Hogwild()
