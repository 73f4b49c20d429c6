"""APR on products: a child for each half of the factors, then for each row of the long multiplication.

A thread that is given factors (a) hands both halves to children and goes on with their products, as (b). A product of
two numbers goes to children by three digits of the second (b), and three digits one by one (c). The children's results
come back in columns, each with its place behind it, as one writes rows below each other, and the parent adds them up.

    a   A742B103C015=\\n            spawns  AB\\nCC\\n                join  a6b2c4d6e7f0*a5b1c0=\\n, and on as b or c
    b   a2b4c7*a1b0c3d9e0f1=\\n     spawns  a1b0c3\\nd9e0f1\\n        join  02a6.. in columns; writes the steps of a sum
    c   a2b4c7*a1b0c3=\\n           spawns  a1\\nb0\\nc3\\n            likewise
    d   3*a2b4c7=\\n                writes  a^0a6b^0b2c^1c2d^2d2\\n  the steps of a row
    e   A015=\\n                    writes  a5b1c0\\n

`numerals.py` says how numbers and steps are written.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.dialect import (
    CALL_BEGIN,
    CALL_END,
    JOIN_BEGIN,
    JOIN_END,
    ChildResult,
    Ending,
    Malformed,
    SpawnCall,
    SpawnDialect,
)
from apr_jax.tasks.multiplication import numerals
from apr_jax.tasks.multiplication.numerals import (
    DIGITS,
    FACTOR_DIGITS,
    NAMES,
    NUMBER,
    PLACES,
    digits_of,
    last_number,
    read_number,
    value_of,
    write_factors,
    write_number,
)
from apr_jax.tasks.multiplication.rules import Problem, read_answer, read_factors

_FACTORS = re.compile(f"((?:[A-H][{DIGITS}]{{3}})+)=\n")
_PRODUCT = re.compile(f"^({NUMBER})\\*({NUMBER})=\n", re.M)
_ROW = re.compile(f"([{DIGITS}])\\*({NUMBER})=\n")
_COLUMNS = re.compile(f"{JOIN_BEGIN}((?:[{DIGITS}]*[a-x][{DIGITS}])+)\n{JOIN_END}")
_COLUMN = re.compile(f"([{DIGITS}]*)[a-x]([{DIGITS}])")
_HALF = re.compile(f"([{NAMES}])([{NAMES}])")


class Adaptive(SpawnDialect):
    """A spawn names halves of the factors or parts of the second number, a join has what became of them."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return write_factors([digits_of(factor, FACTOR_DIGITS) for factor in problem])

    def read_ending(self, text: str) -> Ending:
        return read_answer(text)

    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        """Read a spawn. Reasons: no_call_begin, malformed_line, duplicate_child, nothing_to_split, unknown_part."""
        begin = (text.rfind if last_begin else text.find)("\n" + CALL_BEGIN) + 1
        if begin == 0:
            return Malformed("no_call_begin")
        *lines, rest = text[begin + len(CALL_BEGIN) : -len(CALL_END)].split("\n")
        if not lines or rest:
            return Malformed("malformed_line")
        if len({line[0:1] for line in lines}) < len(lines):
            return Malformed("duplicate_child")
        given, products = _FACTORS.match(text), _PRODUCT.findall(text[:begin])
        if products:
            contexts = [_part(products[-1][0], line) for line in lines]
        elif given:
            contexts = [_half(read_factors(given[1]), line) for line in lines]
        else:
            return Malformed("nothing_to_split")
        found = [context for context in contexts if context is not None]
        return SpawnCall(begin, tuple(found), tuple(lines), None) if found == contexts else Malformed("unknown_part")

    def read_child(self, text: str, name: str) -> ChildResult | Malformed:
        digits = last_number(text)
        return Malformed("unfinished") if digits is None else ChildResult(name, write_number(digits))

    def render_join(self, results: Sequence[ChildResult], level: int | None) -> str:
        """Return the product of halves, or the columns of what became of parts; a child without a result has zeros."""
        if results[0].name[:1] in NAMES:
            return f"{JOIN_BEGIN}{'*'.join(result.path or '' for result in results)}=\n{JOIN_END}"
        rows = [(PLACES.find(result.name[:1]), read_number(result.path or "") or []) for result in results]
        return write_columns(numerals.columns(rows))

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: Any, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        return tuple(self._calls(self.prompt(problem), 0))

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        digits, asked = last_number(context + completion), asked_value(context)
        if digits is None or asked is None:
            return "unfinished"
        return "solved" if value_of(digits) == asked else "wrong_value"

    def _calls(self, text: str, depth: int) -> Iterator[Call]:
        """Yield the calls of the thread that a prompt begins, and of all below it."""
        below: list[Call] = []
        while (written := continuation(text)).endswith(CALL_END):
            yield Call(text, written, depth, ends_in_spawn=True, replay_start=len(written))
            spawn = self.read_spawn(text + written)
            assert isinstance(spawn, SpawnCall), "demonstrations are well-formed"
            results = []
            for name, context in zip(spawn.names, spawn.contexts, strict=True):
                calls = list(self._calls(context, depth + 1))
                last = max(index for index, call in enumerate(calls) if call.depth == depth + 1)
                results.append(self.read_child(calls[last].context + calls[last].completion, name))
                below += calls
            text += self.render_join([each for each in results if isinstance(each, ChildResult)], None)
        yield Call(text, written, depth, ends_in_spawn=False, replay_start=len(written))
        yield from below


def write_columns(columns: Sequence[Sequence[int]]) -> str:
    """Return the join of numbers that are to be added: the digits of each place, and the place before the last."""
    written = [
        "".join(DIGITS[digit] for digit in column[:-1]) + place + DIGITS[column[-1]]
        for place, column in zip(PLACES, columns, strict=False)
    ]
    return f"{JOIN_BEGIN}{''.join(written)}\n{JOIN_END}"


def continuation(text: str) -> str:
    """Return what a thread that has come so far writes next: a spawn, or the line that ends it."""
    sums = asked_sums(text)
    if sums is not None:
        return numerals.write_steps(numerals.take_steps(sums)) + "\n"
    products = _PRODUCT.findall(text)
    if products:
        number = read_number(products[-1][1]) or []
        size = 1 if len(number) <= FACTOR_DIGITS else FACTOR_DIGITS
        whole = write_number(number)
        lines = [whole[2 * place : 2 * (place + size)] for place in range(0, len(number), size)]
    else:
        factors = read_factors(text)
        if len(factors) == 1:
            return write_number(factors[0]) + "\n"
        middle = (len(factors) + 1) // 2
        lines = [NAMES[0] + NAMES[middle - 1], NAMES[middle] + NAMES[len(factors) - 1]]
    return CALL_BEGIN + "".join(f"{line}\n" for line in lines) + CALL_END


def asked_sums(text: str) -> list[int] | None:
    """Return the sums, by place, of the number that a thread writes next; None where it writes no steps."""
    row, joined = _ROW.match(text), _COLUMNS.search(text)
    if row:
        return numerals.row_sums(read_number(row[2]) or [], DIGITS.index(row[1]))
    if joined:
        return [sum(map(DIGITS.index, above + last)) for above, last in _COLUMN.findall(joined[1])]
    return None


def asked_value(prompt: str) -> int | None:
    """Return the product that a thread's prompt asks for; None for a prompt of another kind."""
    factors, product, row = _FACTORS.match(prompt), _PRODUCT.match(prompt), _ROW.match(prompt)
    if factors:
        numbers = read_factors(factors[1])
    elif product:
        numbers = [read_number(product[1]) or [], read_number(product[2]) or []]
    elif row:
        numbers = [[DIGITS.index(row[1])], read_number(row[2]) or []]
    else:
        return None
    value = 1
    for digits in numbers:
        value *= value_of(digits)
    return value


def _part(number: str, part: str) -> str | None:
    """Return the prompt of a number times one digit or three of another; None for a part that has no such prompt."""
    if re.fullmatch(NUMBER, part) is None or len(part) not in (2, 2 * FACTOR_DIGITS):
        return None
    shift, digits = PLACES.index(part[0]), part[1::2]
    in_order = part[::2] == PLACES[shift : shift + len(digits)]
    known = read_number(number)
    if known is None or not in_order or shift + len(digits) + len(known) > len(PLACES):
        return None
    written = digits if len(digits) == 1 else write_number([DIGITS.index(digit) for digit in digits])
    return f"{written}*{number}=\n" if len(digits) == 1 else f"{number}*{written}=\n"


def _half(factors: Sequence[Sequence[int]], line: str) -> str | None:
    """Return the prompt of the factors from one to another; None where there are none such, or it would be all."""
    ends = _HALF.fullmatch(line)
    first, last = (NAMES.index(end) for end in ends.groups()) if ends else (0, -1)
    chosen = factors[first : last + 1]
    if not first <= last < len(factors) or len(chosen) == len(factors):
        return None
    if len(chosen) == 2:
        return f"{write_number(chosen[0])}*{write_number(chosen[1])}=\n"
    return write_factors(chosen)


ADAPTIVE = Adaptive()
