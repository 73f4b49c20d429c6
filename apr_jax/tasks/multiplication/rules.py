"""Problems and their verifier: exact integers, and nothing that a model writes is ever evaluated."""

import math
import re
from typing import Any

from apr_jax.config import shown
from apr_jax.tasks.base import Verdict
from apr_jax.tasks.dialect import Ending
from apr_jax.tasks.multiplication.numerals import DIGITS, LARGEST_FACTOR, NAMES, last_number, value_of

Problem = tuple[int, ...]  # the factors, each 0..1000

_LONGEST_ANSWER = 100  # characters
_FACTOR = re.compile("[0-9]{1,4}")


def verify(answer: str | None, problem: Problem) -> Verdict:
    """Judge an answer, which must be the product in decimal digits."""
    if answer is None:
        return Verdict(False, "no_answer")
    if not (answer.isascii() and answer.isdecimal() and len(answer) <= _LONGEST_ANSWER):
        return Verdict(False, "no_number")
    return Verdict(True, "correct") if int(answer) == math.prod(problem) else Verdict(False, "wrong_value")


def read_problem(value: Any) -> Problem:
    """Return the problem that factors, `742*103*15`, or a JSON object with that as its title describe.

    Raises ValueError.
    """
    given = value.get("title") if isinstance(value, dict) else value
    if isinstance(given, str):
        texts = re.split(r"\s*[* ]\s*", given.strip())
        given = [int(text) if _FACTOR.fullmatch(text) else None for text in texts]
    if not (isinstance(given, (list, tuple)) and 2 <= len(given) <= len(NAMES) and all(type(x) is int for x in given)):
        raise ValueError(f"{shown(value)} is no product of 2 to {len(NAMES)} integers")
    if not (min(given) >= 0 and max(given) <= LARGEST_FACTOR):
        raise ValueError(f"{shown(value)} has a factor that is not in 0..{LARGEST_FACTOR}")
    return tuple(given)


def read_answer(text: str) -> Ending:
    """Read the number that ends a thread's text as its answer."""
    digits = last_number(text)
    if digits is None:
        return Ending(None, "malformed", "unfinished")
    return Ending(str(value_of(digits)), "answered", "")


def read_factors(named: str) -> list[list[int]]:
    """Return the digits of the factors of a prompt, the ones first."""
    return [[DIGITS.index(digit) for digit in reversed(each)] for each in re.findall(f"[A-H]([{DIGITS}]+)", named)]
