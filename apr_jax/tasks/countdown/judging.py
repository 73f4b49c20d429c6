"""Judgements of a rollout's traces beside its answer: operations, and the paths that children handed back."""

import re

from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import Malformed

_WRITTEN = re.compile(r"^Exploring Operation: (.*)\n", re.M)
_ATTEMPT = re.compile(r"[0-9]{1,18}[-+*/][0-9]{1,18}")
_DIVISION = re.compile(r"\A([0-9]{1,18})/[0-9]{1,18}, ([^,]*)(?:,\1(?: unequal: No Solution)?)?\Z")
_OPERATION = re.compile(r"([0-9]{1,18})[-+*/]([0-9]{1,18})=[0-9]{1,18}")


def count_operations(text: str) -> tuple[int, int]:
    """Count the operations that `text` explores (whole lines only), and those that are arithmetically right.

    Lines that name two numbers and no result (`task.attempts`) are none; of a division its product counts.
    """
    lines = (line.partition(", Resulting Numbers: ")[0] for line in _WRITTEN.findall(text))
    operations = (_DIVISION.sub(r"\2", line) for line in lines)
    written = [operation for operation in operations if not _ATTEMPT.fullmatch(operation)]
    return len(written), sum(map(_is_right, written))


def path_solves(path: str, problem: Problem) -> bool:
    """Tell whether a child's winning path, after the operations that led to the child, solves the whole problem."""
    return rules.verify(path, problem).correct


def child_result(text: str, problem: Problem) -> str:
    """Return how a child that searches ended: solved, wrong_path, no_solution, or why it is malformed."""
    answer = trace.read_answer(text) or ""
    if answer.startswith(trace.move_line(trace.ROOT_ID)) and rules.verify(answer, problem).correct:
        return "solved"  # a worker on a shared cache replays from the problem's own root
    result = trace.read_child(text, trace.thread_node(text) or "")
    if isinstance(result, Malformed):
        return result.reason
    if result.path is None:
        return "no_solution"
    return "solved" if path_solves(result.path, problem) else "wrong_path"


def _is_right(operation: str) -> bool:
    match = _OPERATION.fullmatch(operation)
    return match is not None and operation in [text for _, text in rules.operations(int(match[1]), int(match[2]))]
