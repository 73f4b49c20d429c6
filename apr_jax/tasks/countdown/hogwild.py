"""Hogwild! on Countdown: two workers that search one problem in lockstep and see each other's text as it comes.

Both get the prompt of an adaptive thread; a line of its own tells each which one it is. The first tries the operations
on the problem's numbers from the first on, the second from the last on; each is followed at once by all that comes
below it. So nobody repeats what the other has done, and together they have tried everything when they meet:

    <Start Sub Search 0 at level 1> Moving to Node #0          <Start Sub Search 1 at level 1> Moving to Node #0
    Exploring Operation: 3+7=10, Resulting Numbers: [12, 10]   Exploring Operation: 12-7=5, Resulting Numbers: [3, 5]
    Exploring Operation: 12+10=22, Resulting Numbers: [22]     Exploring Operation: 3+5=8, Resulting Numbers: [8]
    22,30 unequal: No Solution                                 8,30 unequal: No Solution
    ...                                                        ...

These lines are short; with `task.search_order` "depth_first" they are those of `search.py` below each operation. Who
reaches the goal replays its path from the root and has thereby answered. Who sees that the other has reached it leaves
before its next operation (`LEAVE`), and who sees that the other has begun the operation that would be its next writes
"No solution found.". What a worker sees, and when, is `engine/groups.py`'s rule, so a demonstration depends on how many
tokens each line has. All phrases are of the trace grammar (`trace.py`).
"""

import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator, Sequence

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.search import Node, Search, SearchDialect, Step, usable_steps
from apr_jax.tasks.dialect import Ending, WorkerDialect

LEAVE = "Exit Sub Search at level 1\n"
_ALL = sys.maxsize  # a beam that keeps every operation


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
        """Return two workers' calls, one each, searched in lockstep; depth-first ones may draw (`task.shuffle`)."""
        branches = _branches(Search(problem, rng, section), section)
        orders = (branches, branches[::-1])
        workers = [_Worker(itertools.chain.from_iterable(order), n) for n, order in enumerate(orders)]
        while not all(worker.done for worker in workers):
            # Who is behind moves first, so that all that it can see is known.
            worker = min((each for each in workers if not each.done), key=lambda each: (each.time, each.number))
            _advance(worker, workers[1 - worker.number], count_tokens)
        return tuple(
            Call(self.prompt(problem) + self.header(worker.number), worker.text, 0, False, worker.replay_start)
            for worker in workers
        )


def _has_left(text: str) -> bool:
    """Tell whether a worker ended because another had reached the goal."""
    return text.endswith("\n" + LEAVE) and not rules.claims_goal(text)


@dataclasses.dataclass(frozen=True)
class _Step:
    """Lines that a worker writes before it looks up: those of one operation, or of a state."""

    text: str
    first: int | None = None  # of an operation on the problem's own numbers: which of them it is
    replay: str | None = None  # of one that reaches the goal: the lines that lead there


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


def _advance(worker: _Worker, other: _Worker, count_tokens: CountTokens) -> None:
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
        if step.replay is not None:
            worker.goal_time, replay = worker.time, step.replay
        else:
            worker.done = False
            if step.first is not None:
                worker.begun.append((worker.time, step.first))
    worker.replay_start = len(worker.text)
    worker.text += replay


def _branches(search: Search, task: CountdownConfig) -> list[list[_Step]]:
    """Return what a worker writes from each operation on the problem's numbers on, up to a goal, in their order."""
    if task.search_order == "depth_first" and len(search.root.numbers) > 2:
        expansion = search.expand(search.root, _ALL)
        attempts = expansion.attempts
        nodes = zip(expansion.nodes, expansion.texts, strict=True)
        branches = [_in_full(search, task, node, text) for node, text in nodes]
    else:
        steps, attempts = usable_steps(search.root.numbers, task)
        branches = [list(_in_short(search.problem, task, search.root.numbers, step)) for step in steps]
    numbered = [[dataclasses.replace(begin, first=n), *rest] for n, (begin, *rest) in enumerate(branches)]
    return [*numbered, [_Step(attempts)]] if attempts else numbered


def _in_full(search: Search, task: CountdownConfig, node: Node, text: str) -> list[_Step]:
    lines: list[str] = []
    goal = search.branch(search.root, node, text, _ALL, lines)
    steps = [_Step(line) for line in lines]
    if goal is not None:
        replayed_from = node if task.parent_replay == "child" else search.root
        steps[-1] = dataclasses.replace(steps[-1], replay=search.replay(goal, replayed_from))
    return steps


def _in_short(
    problem: Problem, task: CountdownConfig, numbers: Sequence[int], step: Step, path: str = ""
) -> Iterator[_Step]:
    left = step.leaves(numbers)
    if len(left) == 1:
        text = trace.final_lines(problem.target, step.result, step.operation)
        is_goal = step.result == problem.target
        yield _Step(step.before + text, replay=trace.root_prompt(problem) + path + text if is_goal else None)
        return
    line = f"Exploring Operation: {step.operation}, Resulting Numbers: {left}\n"
    yield _Step(step.before + line)
    below, attempts = usable_steps(left, task)
    for each in below:
        for written in _in_short(problem, task, left, each, path + line):
            yield written
            if written.replay is not None:
                return
    if attempts:
        yield _Step(attempts)


HOGWILD = Hogwild()
