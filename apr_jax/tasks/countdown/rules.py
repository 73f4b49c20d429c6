"""Countdown problems and the one verifier of answers (paper section 4.1).

A problem asks to use every number exactly once with + - * / so that the target comes out. Operations on a pair: a+b,
a*b, larger-smaller, and larger/smaller where it divides exactly; nothing negative and no fraction ever arises.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from apr_jax.config import ConfigError
from apr_jax.tasks.base import Verdict
from apr_jax.tasks.countdown.config import CountdownConfig

NUMBER = r"(?:0|[1-9][0-9]{0,17})"  # bounded, so that int() stays cheap on any text
_OPERATION_LINE = re.compile(
    rf"Exploring Operation: ({NUMBER})([-+*/])({NUMBER})=({NUMBER}), Resulting Numbers: \[.*\]"
)
# An answer that begins at a state below the root, and the operations that led to it.
_BEGINS_BELOW = re.compile(
    rf"Moving to Node #0(?:,{NUMBER})+\nCurrent State: {NUMBER}:\[[^\]\n]*\], Operations: \[([^\]\n]*)\]\n"
)
_LISTED = re.compile(rf"'({NUMBER})([-+*/])({NUMBER})=({NUMBER})'")
_GOAL_LINE = re.compile(rf"({NUMBER}),({NUMBER}) equal: Goal Reached")
_EXIT_LINE = re.compile(r"Exit Sub Search at level [0-9]+")
_TOO_LARGE = 10**18
_MAX_DRAWS = 10_000
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The numbers to use, in the order in which they are shown, and the target.

    Raises:
      ValueError: fewer than two numbers, a number that is not an int, is negative or has more than 18 digits, which no
        trace can write, or a target below 1.
    """

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, tuple) or not all(type(n) is int for n in self.numbers):
            raise ValueError(f"Problem.numbers={self.numbers!r} must be a tuple of ints")
        if len(self.numbers) < 2:
            raise ValueError(f"Problem.numbers={self.numbers!r}: Countdown needs at least 2 numbers")
        if min(self.numbers) < 0:
            raise ValueError(f"Problem.numbers={self.numbers!r} must not be negative")
        if type(self.target) is not int or self.target < 1:
            raise ValueError(f"Problem.target={self.target!r} must be a positive int")
        if max(*self.numbers, self.target) >= _TOO_LARGE:
            raise ValueError("Problem: its numbers and its target have at most 18 digits")

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """The sorted numbers and the target, which are equal for equal problems."""
        return tuple(sorted(self.numbers)), self.target


def verify(answer: str | None, problem: Problem) -> Verdict:
    """Judge the text of a winning path (as `trace.read_answer` gives it). Never raises, whatever the text.

    The operations are those that the first state lists if the answer begins below the root, then its `Exploring
    Operation` lines, all of them, in order. Each must be arithmetically right and take two numbers that are there at
    that point; in the end one number must be left, the target, and the answer must close by claiming so (`T,T equal:
    Goal Reached`, then only `Exit Sub Search` lines). Node ids and the copies of the state between the operations are
    not judged: they cannot make a wrong solution right.
    """
    if answer is None:
        return Verdict(False, "no_answer")
    available = Counter(problem.numbers)
    result = None
    for operation in _read_operations(answer):
        if operation is None:
            return Verdict(False, "malformed_operation")
        left, operator, right, result = operation
        for number in (left, right):
            if available[number] < 1:
                return Verdict(False, "number_not_available")
            available[number] -= 1
        if not _holds(left, operator, right, result):
            return Verdict(False, "wrong_arithmetic")
        available[result] += 1
    if result is None:
        return Verdict(False, "no_operations")
    if available.total() > 1:
        return Verdict(False, "numbers_left_over")
    if result != problem.target:
        return Verdict(False, "target_missed")
    goal = f"{problem.target},{problem.target} equal: Goal Reached"
    return Verdict(True, "correct") if _last_line(answer) == goal else Verdict(False, "goal_not_claimed")


def express(answer: str, problem: Problem) -> str:
    """Return the winning path as an expression for people: `(53-22)*2`, with brackets only where they are needed.

    Raises ValueError unless `verify` finds the answer correct.
    """
    verdict = verify(answer, problem)
    if not verdict.correct:
        raise ValueError(f"no expression of an answer that is wrong ({verdict.reason})")
    terms = [(number, str(number), "") for number in problem.numbers]  # value, text, outermost operator

    def take(value: int, operator: str, *, on_the_right: bool) -> str:
        index = next(index for index, term in enumerate(terms) if term[0] == value)
        _, text, inner = terms.pop(index)
        weaker = bool(inner) and _BINDING[inner] < _BINDING[operator]
        reordered = on_the_right and inner != "" and _BINDING[inner] == _BINDING[operator] and operator in "-/"
        return f"({text})" if weaker or reordered else text

    for left, operator, right, result in filter(None, _read_operations(answer)):
        first = take(left, operator, on_the_right=False)
        terms.append((result, f"{first}{operator}{take(right, operator, on_the_right=True)}", operator))
    return terms[0][1]


def canonical_path(answer: str | None) -> tuple[str, ...] | None:
    """Return a path's operations, sorted, with the smaller operand of + and * first: equal for equal paths.

    None where there is no answer, or one that holds no operation or something else in place of one; whether it is right
    does not matter.
    """
    operations = []
    for operation in _read_operations(answer or ""):
        if operation is None:
            return None
        left, operator, right, result = operation
        if operator in "+*":
            left, right = sorted((left, right))
        operations.append(f"{left}{operator}{right}={result}")
    return tuple(sorted(operations)) or None


def departures(problem: Problem, section: CountdownConfig) -> list[str]:
    """Say in what a problem is unlike those that `section` draws; nothing where it could be one of them."""
    found = []
    if len(problem.numbers) != section.num_numbers:
        found.append(f"{len(problem.numbers)} numbers instead of {section.num_numbers}")
    if not all(section.min_number <= number <= section.max_number for number in problem.numbers):
        found.append(f"numbers outside {section.min_number}..{section.max_number}")
    if not section.min_target <= problem.target <= section.max_target:
        found.append(f"a target outside {section.min_target}..{section.max_target}")
    return found


def claims_goal(text: str) -> bool:
    """Tell whether the text ends in a line `T,T equal: Goal Reached`, lines that leave a sub search aside."""
    match = _GOAL_LINE.fullmatch(_last_line(text))
    return match is not None and match[1] == match[2]


@functools.lru_cache(maxsize=1 << 16)
def operations(left: int, right: int) -> tuple[tuple[int, str], ...]:
    """Return the results of combining two numbers, each with its text (`87-78=9`), in the order + - * /."""
    large, small = (left, right) if left >= right else (right, left)
    combined = (
        (left + right, f"{left}+{right}={left + right}"),
        (large - small, f"{large}-{small}={large - small}"),
        (left * right, f"{left}*{right}={left * right}"),
    )
    if small and large % small == 0:
        return (*combined, (large // small, f"{large}/{small}={large // small}"))
    return combined


def steps(numbers: Sequence[int]) -> Iterator[tuple[int, str, list[int]]]:
    """Yield each operation on two of the numbers: its result, its text, and the numbers that it leaves.

    They come by pair and then in the order + - * /, which is the order of all solvers.
    """
    for i in range(len(numbers) - 1):
        for j in range(i + 1, len(numbers)):
            for result, operation in operations(numbers[i], numbers[j]):
                yield result, operation, [*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :], result]


def is_solvable(numbers: Sequence[int], target: int) -> bool:
    """Tell whether operations that use every number exactly once can give the target (at least 1).

    Works on subsets of the numbers: what a subset can give are the combinations of what its two parts can give.
    """
    full = (1 << len(numbers)) - 1
    reachable: dict[int, set[int]] = {1 << i: {number} for i, number in enumerate(numbers)}
    for subset in range(3, full):
        if subset not in reachable:
            values: set[int] = set()
            for part in _parts(subset):
                _combine(reachable[part], reachable[subset ^ part], values)
            reachable[subset] = values
    for part in _parts(full):
        fewer, more = sorted((reachable[part], reachable[full ^ part]), key=len)
        if any(not more.isdisjoint(_partners(value, target)) for value in fewer):
            return True
    return False


def sample_problem(rng: random.Random, task: CountdownConfig, targets: Sequence[int] | None = None) -> Problem:
    """Draw a solvable problem: numbers uniform in their range, target in `targets` (default: the task's range).

    Raises:
      ConfigError: none of many draws could be solved.
    """
    choices = range(task.min_target, task.max_target + 1) if targets is None else targets
    draws = _MAX_DRAWS if task.num_numbers < 6 else _MAX_DRAWS // 10  # within seconds
    for _ in range(draws):
        numbers = tuple([rng.randint(task.min_number, task.max_number) for _ in range(task.num_numbers)])
        target = rng.choice(choices)
        if is_solvable(numbers, target):
            return Problem(numbers, target)
    raise ConfigError(
        f"none of {draws} draws of {task.num_numbers} numbers in {task.min_number}..{task.max_number} "
        f"reaches a target in {min(choices)}..{max(choices)}"
    )


@functools.lru_cache(maxsize=1 << 10)
def _parts(subset: int) -> tuple[int, ...]:
    """Return one part of each split of a bit set into two non-empty parts."""
    return tuple(part for part in range(1, subset) if part & subset == part and part > subset ^ part)


def _combine(lefts: set[int], rights: set[int], values: set[int]) -> None:
    """Add to `values` every result of one number of each set."""
    for left in lefts:
        for right in rights:
            values.add(left + right)
            values.add(left * right)
            large, small = (left, right) if left >= right else (right, left)
            values.add(large - small)
            if small and large % small == 0:
                values.add(large // small)


def _partners(value: int, target: int) -> list[int]:
    """Return the numbers that one operation with `value` turns into the target; negative ones match nothing."""
    partners = [target - value, target + value, value - target]
    if value:
        partners.append(target * value)
        if target % value == 0:
            partners.append(target // value)
        if value % target == 0:
            partners.append(value // target)
    return partners


def _read_operations(answer: str) -> Iterator[tuple[int, str, int, int] | None]:
    """Yield left, operator, right and result of each operation that the answer makes; None for a malformed one."""
    begun = _BEGINS_BELOW.match(answer)
    matches = [_LISTED.fullmatch(operation) for operation in begun[1].split(", ")] if begun else []
    lines = (line for line in answer.split("\n") if line.startswith("Exploring Operation"))
    for match in itertools.chain(matches, map(_OPERATION_LINE.fullmatch, lines)):
        yield match and (int(match[1]), match[2], int(match[3]), int(match[4]))


def _holds(left: int, operator: str, right: int, result: int) -> bool:
    if operator == "+":
        return left + right == result
    if operator == "-":
        return left - right == result
    if operator == "*":
        return left * right == result
    return right != 0 and left == right * result


def _last_line(text: str) -> str:
    lines = text.rstrip("\n").split("\n")
    while lines and _EXIT_LINE.fullmatch(lines[-1]):
        lines.pop()
    return lines[-1] if lines else ""
