"""Numerals: how numbers are written, and the one step that all of the arithmetic takes.

A *digit* is 0..9 or X, which is ten. So 1000 has three digits, `X00`, and no factor needs a fourth. Problems have the
digits as people write them, the ones last. Numbers that are computed have the ones first, and each digit names its
*place* (a: ones, b: tens, up to x): 742 is `a2b4c7`. A number keeps its zeros at the top, so its length depends only on
how many factors are in it. Its top digit may be X.

A number is computed from one sum for each place by steps: the carry that comes in, as `b^1`, then the digit. The sums
of 8 * 742 are 16, 32, 56 and 0, and its steps `a^0a6b^1b3c^3c9d^5d5`. Carry and digit both name the place, so what is
to be looked up for the next token can be told from this one.
"""

import re
from collections.abc import Sequence

PLACES = "abcdefghijklmnopqrstuvwx"
DIGITS = "0123456789X"
NAMES = "ABCDEFGH"  # of the factors
FACTOR_DIGITS = 3
LARGEST_FACTOR = 1000

NUMBER = f"(?:[a-x][{DIGITS}])+"
_PLACED = re.compile(f"([a-x])([{DIGITS}])")
_STEP = re.compile(f"([a-x])\\^([{DIGITS}])\\1([{DIGITS}])")
_LAST_STEPS = re.compile(f"(?:^|\n)((?:[a-x]\\^[{DIGITS}][a-x][{DIGITS}])+)\n\\Z")
_LAST_NUMBER = re.compile(f"(?:^|\n)({NUMBER})\n\\Z")

Step = tuple[int, int]  # the carry that comes in, and the digit


def digits_of(value: int, length: int) -> list[int]:
    """Return the digits of a number of at most 10**length, the ones first."""
    digits = [value // 10**place % 10 for place in range(length - 1)]
    return [*digits, value // 10 ** (length - 1)]


def value_of(digits: Sequence[int]) -> int:
    """Return the number that digits, the ones first, are."""
    return sum(digit * 10**place for place, digit in enumerate(digits))


def write_number(digits: Sequence[int], sign: str = "", first: int = 0) -> str:
    """Return digits with their places, counted from `first` on, and where given with a sign before each digit."""
    return "".join(f"{place}{sign}{DIGITS[digit]}" for place, digit in zip(PLACES[first:], digits, strict=False))


def read_number(text: str) -> list[int] | None:
    """Return the digits of a number; None where places are left out or out of order."""
    placed = _PLACED.findall(text)
    if "".join(place for place, _ in placed) != PLACES[: len(placed)]:
        return None
    return [DIGITS.index(digit) for _, digit in placed]


def last_number(text: str) -> list[int] | None:
    """Return the digits of the number that a thread's text ends in, as such or in steps; None where there is none."""
    steps, number = read_steps(text), _LAST_NUMBER.search(text)
    if steps:
        return [digit for _, digit in steps]
    return read_number(number[1]) if number else None


def write_factors(factors: Sequence[Sequence[int]]) -> str:
    """Return the prompt of a product: each factor's name and its digits, the ones last."""
    named = zip(NAMES, factors, strict=False)
    return "".join(name + "".join(DIGITS[digit] for digit in reversed(digits)) for name, digits in named) + "=\n"


def take_steps(sums: Sequence[int]) -> list[Step]:
    """Return the steps that write a number of which each place's sum is known. The top place keeps what is left."""
    steps, carry = [], 0
    for place, total in enumerate(sums):
        value = total + carry
        steps.append((carry, value if place == len(sums) - 1 else value % 10))
        carry = value // 10
    return steps


def write_steps(steps: Sequence[Step]) -> str:
    """Return the text of steps."""
    pairs = zip(PLACES, steps, strict=False)
    return "".join(f"{place}^{DIGITS[carry]}{place}{DIGITS[digit]}" for place, (carry, digit) in pairs)


def read_steps(text: str) -> list[Step]:
    """Return the steps that a text ends in, before its last newline; none where it ends in none."""
    line = _LAST_STEPS.search(text)
    found = _STEP.findall(line[1]) if line else []
    whole = "".join(place for place, _, _ in found) == PLACES[: len(found)] and line and len(line[1]) == 5 * len(found)
    return [(DIGITS.index(carry), DIGITS.index(digit)) for _, carry, digit in found] if whole else []


def count_right(sums: Sequence[int], steps: Sequence[Step]) -> int:
    """Count the steps that follow from their sum and from the step before, whether or not that was right."""
    right, carry = 0, 0
    for place, (total, (written, digit)) in enumerate(zip(sums, steps, strict=False)):
        value = total + written
        right += written == carry and digit == (value if place == len(sums) - 1 else value % 10)
        carry = value // 10
    return right


def row_sums(digits: Sequence[int], multiplier: int) -> list[int]:
    """Return the sums of a number times a digit."""
    return [*(digit * multiplier for digit in digits), 0]


def columns(shifted: Sequence[tuple[int, Sequence[int]]]) -> list[list[int]]:
    """Return the digits of numbers by place, each number shifted by so many places; 0 where it has none."""
    length = max((shift + len(digits) for shift, digits in shifted), default=0)
    return [
        [digits[place - shift] if 0 <= place - shift < len(digits) else 0 for shift, digits in shifted]
        for place in range(length)
    ]
