"""One long multiplication after the other, in one thread.

The first line is the first factor. Each later line multiplies what the line before came to by the next factor, whose
digits stand in front, the ones first: as the prompt has them, then as multipliers. It goes from place to place, as far
as the result has places: the digit of the number that is multiplied, a carry and a digit in each of the three rows, and
a carry and a digit of their sum.

    prompt      a^2b^4c^7d^3e^0f^1g^5h^1i^0=\\n
    completion  a2b4c7\\n
                Bd^3e^0f^1a*3b*0c*1:2a^06b^00c^000a64a^02b^00c^000b2 ..\\n
                Cg^5h^1i^0a*5b*1c*0: ..\\n

The places of the prompt go on from factor to factor (a to c: the first, d to f: B), so each of its digits has a name
that no other token of the prompt has, and none is found by counting. Carries of rows name their row (a: of the ones),
the digit of the sum its place. `numerals.py` has the rest.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.dialect import Ending, ThreadDialect
from apr_jax.tasks.multiplication.numerals import (
    DIGITS,
    FACTOR_DIGITS,
    NAMES,
    PLACES,
    Step,
    digits_of,
    read_number,
    row_sums,
    take_steps,
    write_number,
)
from apr_jax.tasks.multiplication.rules import Problem, read_answer

_MULTIPLIERS = f"([{NAMES}])(?:[a-x]\\^[{DIGITS}]){{{FACTOR_DIGITS}}}" + "".join(
    f"{place}\\*([{DIGITS}])" for place in PLACES[:FACTOR_DIGITS]
)
_ROWS = "".join(f"{place}\\^[{DIGITS}]{{2}}" for place in PLACES[:FACTOR_DIGITS])
_GROUP = re.compile(f"[{DIGITS}]{_ROWS}[{DIGITS}][a-x][{DIGITS}]")
_LINE = re.compile(f"^{_MULTIPLIERS}:((?:{_GROUP.pattern})+)\n", re.M)


class Serial(ThreadDialect):
    """A chain of long multiplications."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        digits = [digit for factor in problem for digit in digits_of(factor, FACTOR_DIGITS)]
        return write_number(digits, "^") + "=\n"

    def read_ending(self, text: str) -> Ending:
        begin = text.rfind("\n", 0, -1) + 1
        line = _LINE.fullmatch(text, begin)
        return read_answer(f"\n{_total(line[FACTOR_DIGITS + 2])}\n" if line else "")

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: Any, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        written = "".join(_lines([digits_of(factor, FACTOR_DIGITS) for factor in problem]))
        return (Call(self.prompt(problem), written, 0, ends_in_spawn=False, replay_start=len(written)),)


def written_sums(text: str) -> Iterator[tuple[list[int], list[Step]]]:
    """Yield the sums by place that each row and each sum of a thread's lines should be of, and its steps.

    Rows multiply what the line before came to, and sums add what the rows have, whether or not these are right.
    """
    number = read_number(text.partition("\n")[0])
    for _, *factor, groups in _LINE.findall(text):
        if number is None:
            return
        steps = [
            [(DIGITS.index(pair[0]), DIGITS.index(pair[1])) for pair in _pairs(group)]
            for group in _GROUP.findall(groups)
        ]
        for shift in range(FACTOR_DIGITS):
            row = [group[shift] for group in steps[shift : shift + len(number) + 1]]
            yield row_sums(number, DIGITS.index(factor[shift])), row
        yield [sum(digit for _, digit in group[:-1]) for group in steps], [group[-1] for group in steps]
        number = read_number(_total(groups))


def _lines(factors: Sequence[Sequence[int]]) -> Iterator[str]:
    number = list(factors[0])
    yield write_number(number) + "\n"
    for index, factor in enumerate(factors[1:], 1):
        rows: list[list[Step]] = [
            [(0, 0)] * shift + take_steps(row_sums(number, digit)) + [(0, 0)] * (len(factor) - 1 - shift)
            for shift, digit in enumerate(factor)
        ]
        totals = take_steps([sum(digit for _, digit in column) for column in zip(*rows, strict=True)])
        copied = [*number, *[0] * len(factor)]
        groups = [
            DIGITS[digit] + "".join(map(_row_step, PLACES, column)) + f"{DIGITS[total[0]]}{place}{DIGITS[total[1]]}"
            for digit, column, total, place in zip(copied, zip(*rows, strict=True), totals, PLACES, strict=False)
        ]
        as_given = write_number(factor, "^", first=FACTOR_DIGITS * index)
        yield f"{NAMES[index]}{as_given}{write_number(factor, '*')}:{''.join(groups)}\n"
        number = [digit for _, digit in totals]


def _row_step(row: str, step: Step) -> str:
    return f"{row}^{DIGITS[step[0]]}{DIGITS[step[1]]}"


def _pairs(group: str) -> list[str]:
    """Return the carry and the digit of each of a group's steps, the three rows' first."""
    *rows, total = re.findall("(?<=\\^)..|.[a-x].\\Z", group)
    return [*rows, total[0] + total[2]]


def _total(groups: str) -> str:
    """Return the number that the sums of a line's groups are."""
    return "".join(group[-2:] for group in _GROUP.findall(groups))


SERIAL = Serial()
