"""Nested sums, a small task with children at every level: the value of an expression, modulo 10.

A problem is an expression of digits such as `[[3+4]*5]-[2*8]`. A thread hands every bracket to a child, gets digits
back, and writes one operation; children do the same one level down. So the longest chain of tokens grows with the depth
of an expression and not with its size.

    context      [[3+4]*5]-[2*8]=\\n
    completion   <Calling Sub Searches>\\n[3+4]*5=\\n2*8=\\n<End Calling Sub Searches>\\n
    join         <Sub Searches>\\n5\\n6\\n<End Sub Searches>\\n            in place of the spawn
    completion   5-6=9\\n
"""

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from apr_jax.config import Config, TaskConfig, shown
from apr_jax.config_fields import Range
from apr_jax.tasks.base import Call, CountTokens, Split, Task, Verdict
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

_LONGEST = 256  # characters of an expression that is read
_OPERATION = re.compile(r"^([0-9])([-+*])([0-9])=([0-9])$", re.M)
_ENDING = re.compile(r"(?:^|\n)[0-9][-+*][0-9]=([0-9])\n\Z")


@dataclasses.dataclass(frozen=True)
class Sum:
    """An operation on two operands, each a digit or a bracket."""

    left: "Sum | int"
    operator: str  # + - *
    right: "Sum | int"

    def __str__(self) -> str:
        return f"{_operand(self.left)}{self.operator}{_operand(self.right)}"

    @property
    def value(self) -> int:
        """Modulo 10."""
        left, right = _value(self.left), _value(self.right)
        return {"+": left + right, "-": left - right, "*": left * right}[self.operator] % 10

    @property
    def brackets(self) -> list["Sum"]:
        """The parts that a thread hands to children, in order."""
        return [operand for operand in (self.left, self.right) if isinstance(operand, Sum)]


def read_sum(text: str) -> Sum | None:
    """Read an expression; None for what is none: a model may write anything."""
    return None if len(text) > _LONGEST else _read(text)


def sample(rng: random.Random, depth: int) -> Sum:
    """Draw an expression whose brackets lie at most `depth` - 1 deep; where one may be, three operands of four are."""
    left, right = (sample(rng, depth - 1) if depth > 1 and rng.random() < 0.75 else rng.randrange(10) for _ in range(2))
    return Sum(left, rng.choice("+-*"), right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedSumsConfig(TaskConfig):
    """Nested sums' section of the configuration."""

    # Brackets lie at most depth - 1 deep, and so do threads below the root. What is deeper may be too long to be read.
    depth: Annotated[int, Range(1, 6)]


class Adaptive(SpawnDialect):
    """A spawn names brackets, a join their values."""

    def prompt(self, problem: Sum, budget: int | None = None, window: int | None = None) -> str:
        return f"{problem}=\n"

    def read_ending(self, text: str) -> Ending:
        ending = _ENDING.search(text)
        return Ending(ending[1], "answered", "") if ending else Ending(None, "malformed", "unfinished")

    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        begin = text.rfind("\n" + CALL_BEGIN) + 1
        lines = text[begin + len(CALL_BEGIN) : -len(CALL_END)].splitlines(keepends=True) if begin else []
        if not lines or any(not line.endswith("=\n") or read_sum(line[:-2]) is None for line in lines):
            return Malformed("malformed_spawn")
        return SpawnCall(begin, tuple(lines), tuple(lines), level=None)

    def read_child(self, text: str, name: str) -> ChildResult | Malformed:
        answer, _, reason = self.read_ending(text)
        return Malformed(reason) if reason else ChildResult(name, answer)

    def render_join(self, results: Sequence[ChildResult], level: int | None) -> str:
        return JOIN_BEGIN + "".join(f"{result.path or ''}\n" for result in results) + JOIN_END

    def demonstrate(
        self, problem: Sum, rng: random.Random, section: Any, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        return tuple(_calls(problem, 0))

    def child_result(self, context: str, completion: str, problem: Sum) -> str:
        asked, answer = read_sum(context.partition("=")[0]), self.read_ending(context + completion).answer
        if asked is None or answer is None:
            return "unfinished"
        return "solved" if int(answer) == asked.value else "wrong_value"


class NestedSums(Task):
    """Problems are Sums, answers their value as a digit."""

    name = "nested_sums"
    section = NestedSumsConfig
    problem_fields = ("depth",)
    dialects = MappingProxyType({"adaptive": Adaptive()})
    example = "[3+4]*5"

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Sum]:
        assert isinstance(config.task, NestedSumsConfig)
        return functools.partial(sample, depth=config.task.depth)

    def verify(self, answer: str | None, problem: Sum) -> Verdict:
        if answer is None:
            return Verdict(False, "no_answer")
        return Verdict(True, "correct") if answer == str(problem.value) else Verdict(False, "wrong_value")

    def describe(self, problem: Sum) -> dict[str, Any]:
        return {"title": str(problem), "value": problem.value}

    def read_problem(self, value: Any) -> Sum:
        text = value.get("title") if isinstance(value, dict) else value
        problem = text if isinstance(text, Sum) else read_sum(text) if isinstance(text, str) else None
        if problem is None:
            raise ValueError(f"{shown(value)} is no sum of digits and brackets")
        return problem

    def count_operations(self, text: str, context: str = "") -> tuple[int, int]:
        found = _OPERATION.findall(text)
        return len(found), sum(Sum(int(a), op, int(b)).value == int(c) for a, op, b, c in found)


def operation(problem: Sum) -> str:
    """Return the line of a sum's own operation, on the values of its brackets."""
    return f"{_value(problem.left)}{problem.operator}{_value(problem.right)}={problem.value}\n"


def _calls(problem: Sum, depth: int) -> Iterator[Call]:
    context = f"{problem}=\n"
    if problem.brackets:
        asked = "".join(f"{bracket}=\n" for bracket in problem.brackets)
        yield _call(context, CALL_BEGIN + asked + CALL_END, depth, ends_in_spawn=True)
        context += JOIN_BEGIN + "".join(f"{bracket.value}\n" for bracket in problem.brackets) + JOIN_END
    yield _call(context, operation(problem), depth, ends_in_spawn=False)
    for bracket in problem.brackets:
        yield from _calls(bracket, depth + 1)


def _call(context: str, completion: str, depth: int, *, ends_in_spawn: bool) -> Call:
    return Call(context, completion, depth, ends_in_spawn, replay_start=len(completion))


def _operand(operand: Sum | int) -> str:
    return f"[{operand}]" if isinstance(operand, Sum) else str(operand)


def _value(operand: Sum | int) -> int:
    return operand.value if isinstance(operand, Sum) else operand


def _read(text: str) -> Sum | None:
    """Split at the one operator outside brackets."""
    level, operators = 0, []
    for place, char in enumerate(text):
        level += (char == "[") - (char == "]")
        if level < 0:
            return None
        if level == 0 and char in "+-*":
            operators.append(place)
    if level or len(operators) != 1:
        return None
    left, right = _read_operand(text[: operators[0]]), _read_operand(text[operators[0] + 1 :])
    return None if left is None or right is None else Sum(left, text[operators[0]], right)


def _read_operand(text: str) -> Sum | int | None:
    if len(text) == 1 and text in "0123456789":
        return int(text)
    return _read(text[1:-1]) if text.startswith("[") and text.endswith("]") else None


NESTED_SUMS = NestedSums()
