"""Demonstrations of two workers that search one problem in lockstep and see each other's text as it comes.

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
from collections.abc import Callable, Iterator, Sequence

from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem

NUM_WORKERS = 2
LEAVE = "Exit Sub Search at level 1\n"


def prompt(problem: Problem) -> str:
    """Return what all workers are given."""
    return trace.parent_prompt(problem)


def header(worker: int) -> str:
    """Return the line that tells a worker which one it is, after the prompt."""
    return trace.spawn_line(worker, 1, trace.ROOT_ID)


def has_left(text: str) -> bool:
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
    begun: list[tuple[int, int]] = dataclasses.field(
        default_factory=list
    )  # when the other sees an operation, and which
    goal_time: int | None = None
    replay_start: int | None = None
    done: bool = False


def hogwild_calls(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    count_tokens: Callable[[str], int] | None,
    *,
    budget: bool,
) -> tuple[Call, ...]:
    """Return two workers' calls, one each, searched in lockstep. Nothing is drawn.

    Raises ValueError without `count_tokens`, and for `budget`: a prompt of workers names none.
    """
    del rng, task
    if count_tokens is None:
        raise ValueError("workers see each other token by token: pass count_tokens")
    if budget:
        raise ValueError("hogwild is not conditioned on a budget: set data.condition_on_budget=False")
    firsts = list(enumerate(_operations(problem.numbers)))
    workers = [_Worker(_search(problem, order), n) for n, order in enumerate((firsts, firsts[::-1]))]
    while not all(worker.done for worker in workers):
        # Who is behind moves first, so that all that it can see is known.
        worker = min((each for each in workers if not each.done), key=lambda each: (each.time, each.number))
        _advance(worker, workers[1 - worker.number], problem, count_tokens)
    return tuple(_call(worker, problem) for worker in workers)


def _advance(worker: _Worker, other: _Worker, problem: Problem, count_tokens: Callable[[str], int]) -> None:
    """Write the worker's next operation, or its end."""
    step = next(worker.steps, None)
    seen = {first for time, first in other.begun if time <= worker.time}
    worker.done = True
    if worker.goal_time is None and other.goal_time is not None and other.goal_time <= worker.time:
        worker.text += LEAVE
    elif step is None or step.first in seen:
        worker.text += trace.NO_SOLUTION
    elif step.path is not None:
        worker.text += step.text
        worker.goal_time = worker.time + count_tokens(step.text)
        worker.replay_start = len(worker.text)
        worker.text += prompt(problem) + "".join(step.path)
    else:
        worker.done = False
        worker.text += step.text
        worker.time += count_tokens(step.text)
        if step.first is not None:
            worker.begun.append((worker.time, step.first))


def _call(worker: _Worker, problem: Problem) -> Call:
    replay_start = len(worker.text) if worker.replay_start is None else worker.replay_start
    return Call(prompt(problem) + header(worker.number), worker.text, 0, False, replay_start)


def _search(problem: Problem, firsts: Sequence[tuple[int, tuple[str, list[int]]]]) -> Iterator[_Step]:
    """Yield all operations in order: each of `firsts`, and depth-first those below it, up to the goal."""
    for index, (operation, remaining) in firsts:
        line = _line(operation, remaining)
        if len(remaining) == 1:
            text = trace.final_lines(problem.target, remaining[0], operation)
            yield _Step(text, index, (text,) if remaining[0] == problem.target else None)
            continue
        yield _Step(line, index)
        yield from _below(remaining, problem.target, (line,))


def _below(numbers: Sequence[int], target: int, path: tuple[str, ...]) -> Iterator[_Step]:
    for operation, remaining in _operations(numbers):
        if len(remaining) > 1:
            line = _line(operation, remaining)
            yield _Step(line)
            yield from _below(remaining, target, (*path, line))
        else:
            text = trace.final_lines(target, remaining[0], operation)
            yield _Step(text, path=(*path, text) if remaining[0] == target else None)


def _operations(numbers: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield every operation on two of the numbers, with the numbers that it leaves, in the solvers' order."""
    for i in range(len(numbers) - 1):
        for j in range(i + 1, len(numbers)):
            for result, operation in rules.operations(numbers[i], numbers[j]):
                yield operation, [*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :], result]


def _line(operation: str, remaining: Sequence[int]) -> str:
    return f"Exploring Operation: {operation}, Resulting Numbers: {list(remaining)}\n"
