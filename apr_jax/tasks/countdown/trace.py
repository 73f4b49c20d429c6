"""The lines of search traces, which all dialects share (paper section 3 and its released code).

Every line ends in a newline. A thread begins with the prompt of its node; a thread that reaches the goal replays its
winning path from its own root. Model text is data: readers return `Malformed` with a short reason and never raise.
"""

import re
from collections.abc import Sequence

from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.rules import NUMBER, Problem
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed

NO_SOLUTION = "No solution found.\n"
ROOT_ID = "0"

NODE = rf"{NUMBER}(?:,{NUMBER})*"
NUMBERS = rf"{NUMBER}(?:, {NUMBER})*"
OPERATION = rf"{NUMBER}[-+*/]{NUMBER}={NUMBER}"
_OPERATIONS = rf"(?:'{OPERATION}'(?:, '{OPERATION}')*)?"
_STATE = rf"Current State: ({NUMBER}):\[{NUMBERS}\], Operations: \[({_OPERATIONS})\]"
PROMPT = re.compile(
    rf"(?:Sub Call Budget: {NUMBER} )?(?:Token Budget: {NUMBER} )?(?:Moving to Node #({NODE})\n)?{_STATE}\n"
)
_PROBLEM = re.compile(
    rf"(?:Sub Call Budget: {NUMBER} )?(?:Token Budget: {NUMBER} )?(?:Moving to Node #{ROOT_ID}\n)?"
    rf"Current State: ({NUMBER}):\[({NUMBERS})\], Operations: \[\]\n?"
)
_GOAL_LINE = re.compile(rf"^{NUMBER},{NUMBER} equal: Goal Reached$", re.MULTILINE)
_PATH = re.compile(
    rf"(?:Moving to Node #{NODE}\nCurrent State: {NUMBER}:\[{NUMBERS}\], Operations: \[{_OPERATIONS}\]\n"
    rf"Exploring Operation: {OPERATION}, Resulting Numbers: \[{NUMBERS}\]\n"
    rf"(?:Generated Node #{NODE}: {NUMBER}:\[{NUMBERS}\] Operation: {OPERATION}\n)?)+"
    rf"{NUMBER},{NUMBER} equal: Goal Reached"
)


def move_line(node_id: str) -> str:
    """Return the line that turns to a node."""
    return f"Moving to Node #{node_id}\n"


def state_line(target: int, numbers: Sequence[int], operations: str) -> str:
    """Return the line of a node's state; `operations` is quoted and comma-separated: `'53-22=31', '31-26=5'`."""
    return f"Current State: {target}:{list(numbers)}, Operations: [{operations}]\n"


def generated_lines(node_id: str, target: int, numbers: list[int], operation: str) -> str:
    """Return the lines of an operation that leads to a further state."""
    return (
        f"Exploring Operation: {operation}, Resulting Numbers: {numbers}\n"
        f"Generated Node #{node_id}: {target}:{numbers} Operation: {operation}\n"
    )


def operation_line(operation: str) -> str:
    """Return the line that repeats an operation, below a state to which a search comes back from it."""
    return f"Exploring Operation: {operation}\n"


def attempt_line(operation: str) -> str:
    """Return the line of an operation that has no result, or too large a one: what stands before its `=`."""
    return operation_line(operation.partition("=")[0])


def division_line(large: int, small: int, bound: float) -> str:
    """Return the line that asks if one number divides another: is the largest product of the divisor equal to it?

    It is without one where the divisor is zero, or the product's other factor above `bound`.
    """
    asked = attempt_line(f"{large}/{small}")
    if not small or large // small > bound:
        return asked
    factor = large // small
    product = small * factor
    compared = f"{product},{large}\n" if product == large else outcome_line(large, product)
    return f"{asked[:-1]}, {small}*{factor}={compared}"


def final_lines(target: int, result: int, operation: str) -> str:
    """Return the lines of an operation that leaves one number."""
    return f"Exploring Operation: {operation}, Resulting Numbers: [{result}]\n{outcome_line(target, result)}"


def outcome_line(target: int, result: int) -> str:
    """Return the line that compares the last number with the target."""
    return goal_line(target) if result == target else f"{result},{target} unequal: No Solution\n"


def goal_line(target: int) -> str:
    """Return the line that claims the goal."""
    return f"{target},{target} equal: Goal Reached\n"


def token_budget(tokens: int | None) -> str:
    """Return the beginning of a prompt that names the tokens that its thread may hold or take; "" for no limit."""
    return "" if tokens is None else f"Token Budget: {tokens} "


def root_prompt(problem: Problem) -> str:
    """Return the prompt of a thread that begins at a problem's root."""
    return move_line(ROOT_ID) + state_line(problem.target, problem.numbers, "")


def start_line(index: int, level: int, node_id: str) -> str:
    """Return the line of a spawn that asks for its `index`-th child, counted from 0."""
    return f"<Start Sub Search {index} at level {level}> {move_line(node_id)}"


def read_problem(prompt: str) -> Problem:
    """Return the problem that a root's prompt shows. Raises ValueError where it shows none."""
    match = _PROBLEM.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt[:100]!r} is no root's prompt")
    return Problem(tuple(map(int, match[2].split(", "))), int(match[1]))


def thread_node(text: str) -> str | None:
    """Return the node that a thread's prompt, at the start of its text, turns to; None without a prompt."""
    prompt = PROMPT.match(text)
    return None if prompt is None else prompt[1] or ROOT_ID


def read_answer(text: str) -> str | None:
    """Return the winning path of a finished thread: what follows the second-to-last goal line, without outer blanks.

    None if the text does not end by claiming the goal (`Exit Sub Search` lines aside), or if nothing was replayed.
    """
    if not rules.claims_goal(text):
        return None
    ends = [match.end() for match in _GOAL_LINE.finditer(text)]
    return text[ends[-2] :].strip() if len(ends) > 1 else None


def read_ending(text: str) -> Ending:
    """Read the claim of a thread that ended by itself.

    A thread that ends neither in a goal nor in "No solution found." is malformed ("unfinished"), and so is one that
    claims the goal but replays no path ("no_replay").
    """
    answer = read_answer(text)
    if answer is not None:
        return Ending(answer, "answered", "")
    if text.endswith("\n" + NO_SOLUTION):
        return Ending(None, "no_solution", "no_solution")
    return Ending(None, "malformed", "no_replay" if rules.claims_goal(text) else "unfinished")


def read_child(text: str, node_id: str) -> ChildResult | Malformed:
    """Read what a finished child (prompt and everything after) hands to its parent.

    Reasons: unfinished (ends neither in a goal nor in "No solution found."), no_replay (claims the goal only once),
    malformed_path (the replay is not a path of moves and operations), wrong_root (the replay starts at another node).
    """
    path, status, reason = read_ending(text)
    if status == "no_solution":
        return ChildResult(node_id, None)
    if path is None:
        return Malformed(reason)
    if _PATH.fullmatch(path) is None:
        return Malformed("malformed_path")
    if not path.startswith(move_line(node_id)):
        return Malformed("wrong_root")
    return ChildResult(node_id, path)
