"""Reading texts as the authors' released code reads them (arXiv 2504.15466), in order to score their checkpoints.

It is lenient where `tasks/countdown/` is strict: the last spawn of a thread is read wherever an earlier one began,
numbering and levels of its lines are ignored, and so are children that are asked for twice. A "text" here is a thread's
whole text, prompt included. What the released code passes to `eval` is read by `_value`, which knows literals and
arithmetic alone. Where that code raises, and the rollout counts as wrong, readers here return Malformed.
"""

import ast
import itertools
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from apr_jax.tasks.base import Verdict
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import CALL_BEGIN, JOIN_BEGIN, JOIN_END, Malformed

SPAWN_END = "<End Calling Sub Searches>"
_GOAL = "Goal Reached"
# By the exception with which the released code gives a rollout up: the reason to count it under.
FAULTS: dict[type[Exception], str] = {
    KeyError: "unknown_node",
    IndexError: "cut_off_node",
    ValueError: "malformed_number",
    SyntaxError: "malformed_list",
    NameError: "malformed_list",
    TypeError: "malformed_list",
    AssertionError: "no_call_end",
    RecursionError: "malformed_list",
    MemoryError: "malformed_list",
    OverflowError: "malformed_number",
    ZeroDivisionError: "malformed_number",
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_CAUGHT = tuple(FAULTS)
_OPERATORS = dict(zip((ast.Add, ast.Sub, ast.Mult, ast.Div), _ARITHMETIC.values(), strict=True))
_SIGNS: dict[type[ast.AST], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_PLAIN_LIST = re.compile(r"\[(?:[1-9][0-9]{0,17}(?:, [1-9][0-9]{0,17})*)?\]", re.ASCII)
_OPERATION = re.compile(r"Exploring Operation:\s*(\d+)([-+*/])(\d+)=(\d+),\s*Resulting Numbers:\s*\[(.*?)\]")
_CLAIM = re.compile(r"\d+,\d+ equal: Goal Reached")
_EXPLORED = re.compile(r"Exploring Operation: (.*?=\d+), Resulting Numbers: \[(.*?)\]")
_STATE = re.compile(r"Current State: \d+:\[.*?\], Operations: \[(.*?)\]")


class Node(NamedTuple):
    """A state of the search, as a thread's text tells of it."""

    name: str  # without the #
    target: int
    numbers: Any  # a list, of a thread that writes well
    operations: Any  # likewise

    @property
    def prompt(self) -> str:
        """The prompt of a child that searches from here. Raises TypeError where the numbers are none."""
        numbers = ", ".join(map(str, self.numbers))
        return f"Moving to Node #{self.name}\nCurrent State: {self.target}:[{numbers}], Operations: {self.operations}"


class Spawn(NamedTuple):
    """A spawn: where its text starts, and its children's names and prompts, in order."""

    start: int  # 0 where no CALL_BEGIN stands in the text: the join then takes the place of all of it
    names: tuple[str, ...]
    prompts: tuple[str, ...]


def ends_in_spawn(text: str) -> bool:
    """Tell whether a thread that ended asks for children: its last line, an empty one aside, holds SPAWN_END."""
    return SPAWN_END in text.removesuffix("\n").split("\n")[-1]


def read_spawn(text: str) -> Spawn | Malformed:
    """Read the spawn that ends a thread's text: the lines after the last CALL_BEGIN.

    Reasons are the values of FAULTS.
    """
    text = text.removesuffix("\n")
    if not ends_in_spawn(text):
        return Malformed(FAULTS[AssertionError])
    body = text.split(CALL_BEGIN)[-1].split(f"\n{SPAWN_END}")[0]
    names, prompts = [], []
    try:
        nodes = _nodes(text)
        for line in body.split("\n"):
            if "<Start Sub Search" in line and "Moving to Node" in line:
                node = nodes[line.split("Moving to Node #")[1].strip()]
                names.append(node.name)
                prompts.append(node.prompt)
    except _CAUGHT as error:
        return Malformed(next(reason for kind, reason in FAULTS.items() if isinstance(error, kind)))
    return Spawn(max(0, text.rfind(CALL_BEGIN)), tuple(names), tuple(prompts))


def read_result(text: str) -> str | None:
    """Return a finished thread's path: what follows its second-to-last "Goal Reached". None: it has not two of them."""
    start = text.rfind(_GOAL, 0, max(0, text.rfind(_GOAL)))
    return None if start < 0 else text[start:].strip()[len(_GOAL) + 1 :]


def render_join(names: Sequence[str], results: Sequence[str | None]) -> str:
    """Return the text that takes a spawn's place. The level is 1, whatever the spawn said."""
    lines = [JOIN_BEGIN]
    for index, (name, result) in enumerate(zip(names, results, strict=True)):
        outcome = "No Solution" if result is None else _GOAL
        lines.append(f"<{outcome} in Sub Search {index} at level 1 at Node #{name}>\n")
        lines += [] if result is None else [f"{result}\n"]
    return "".join([*lines, JOIN_END])


def verify_path(answer: str | None, problem: Problem) -> Verdict:
    """Judge an answer as the evaluation of APR does: every operation up to the first claim of the goal."""
    if answer is None:
        return Verdict(False, "no_answer")
    numbers = list(problem.numbers)
    try:
        for line in answer.splitlines():
            match = _OPERATION.search(line)
            if match is not None:
                left, right, result = int(match[1]), int(match[3]), int(match[4])
                written = [int(number) for number in match[5].split(",")] if match[5].strip() else []
                if _ARITHMETIC[match[2]](left, right) != result:
                    return Verdict(False, "wrong_arithmetic")
                for number in (left, right):
                    if number not in numbers:
                        return Verdict(False, "number_not_available")
                    numbers.remove(number)
                if sorted([*numbers, result]) != sorted(written):
                    return Verdict(False, "wrong_numbers")
                numbers = written
            if _GOAL in line:
                reached = numbers == [problem.target]
                return Verdict(reached, "correct" if reached else "target_missed")
    except _CAUGHT:
        return Verdict(False, "malformed_operation")
    return Verdict(False, "goal_not_claimed")


def read_search(text: str) -> str | None:
    """Return the parts of a finished SoS+ thread's text that its scorer reads: the summary, and the last claim.

    The summary stands between the first two claims of the goal. None: there is none with a state in it.
    """
    claims = list(_CLAIM.finditer(text))
    before = text[: claims[-1].start()] if claims else ""
    _, *summaries = before.split(f"{_GOAL}\n")
    explored = list(_EXPLORED.finditer(before))
    if not (summaries and explored and _STATE.search(summaries[0])):
        return None
    last = explored[-1][0]  # of all that was explored: it counts as the last step, wherever it stands
    step = "" if _EXPLORED.findall(summaries[0])[-1:] == _EXPLORED.findall(last) else f"\n{last}\n"
    return summaries[0] + step + claims[-1][0]


def verify_search(answer: str | None, problem: Problem) -> Verdict:
    """Judge what `read_search` gave as the evaluation of SoS+ does: it accepts a number that is used twice.

    The operations of the summary's last state and the last step count, whatever stands in the lines between.
    """
    if answer is None:
        return Verdict(False, "no_answer")
    try:
        operations = [operation.replace("'", "") for operation in _STATE.findall(answer)[-1].split(", ")]
        operations.append(_EXPLORED.findall(answer)[-1][0])
        if int(operations[-1].split("=")[1]) != problem.target:
            return Verdict(False, "target_missed")
        numbers = set(problem.numbers)
        for operation in operations:
            left, right = operation.split("=")
            if _value(left) != int(right):
                return Verdict(False, "wrong_arithmetic")
            if not numbers.issuperset(map(int, re.findall(r"\d+", left))):
                return Verdict(False, "number_not_available")
            numbers.add(int(right))
    except _CAUGHT:
        return Verdict(False, "malformed_operation")
    return Verdict(True, "correct")


def _nodes(text: str) -> dict[str, Node]:
    """Read the nodes that a thread's text tells of: of those it moves to the last state, of others the first line.

    Raises one of FAULTS where the released code does.
    """
    nodes: dict[str, Node] = {}
    lines = text.split("\n")
    for line, following in itertools.pairwise(lines):
        if "Moving to Node #" in line and "Current State:" in following:
            name = line.split("Moving to Node #")[1].strip()
            state = following.split("Current State:")[1].split("],")[0].strip().split(":")
            operations = following.split("Operations:")[1].strip()
            nodes[name] = Node(name, int(state[0]), _value(f"{state[1].strip()}]"), _value(operations))
    for line in lines:
        if "Generated Node" not in line:
            continue
        name = line.split(":")[0].split("#")[1]
        if name not in nodes:
            rest = line.split(":", 1)[1].strip().split("Operation:")
            state, operation = rest[0].strip().split(":"), rest[1].strip()
            target, numbers = int(state[0]), _value(state[1].strip())
            parent = nodes[name.rpartition(",")[0]]
            nodes[name] = Node(name, target, numbers, operator.add(parent.operations, [operation]))
    return nodes


def _value(text: str) -> Any:
    """Evaluate a literal with arithmetic in it. Raises one of FAULTS."""
    if _PLAIN_LIST.fullmatch(text):
        return [int(number) for number in text[1:-1].split(", ")] if len(text) > 2 else []
    with warnings.catch_warnings():  # of what Python thinks of a model's escapes
        warnings.simplefilter("ignore")
        return _evaluated(ast.parse(text.lstrip(" \t"), mode="eval").body)


def _evaluated(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.List(elements) | ast.Tuple(elements) | ast.Set(elements):
            values = map(_evaluated, elements)
            return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](values)
        case ast.UnaryOp(sign, operand) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_evaluated(operand))
        case ast.BinOp(left, kind, right) if type(kind) in _OPERATORS:
            operands = _evaluated(left), _evaluated(right)
            if all(isinstance(operand, int | float) for operand in operands):
                return _OPERATORS[type(kind)](*operands)
        case ast.Name(name):
            raise NameError(name)
    raise SyntaxError("neither a literal nor arithmetic")
