"""The two short prompts of Tree of Thoughts, and demonstrations of both (Yao et al., arXiv 2305.10601, section 4.1).

A proposer is shown a state and writes one line for each operation on it, in fixed order:

    Current State: 27:[5, 2, 11], Operations: []
    Exploring Operation: 5+2=7, Resulting Numbers: [11, 7]
    Exploring Operation: 5-2=3, Resulting Numbers: [11, 3]
    ...

An evaluator is shown a state and writes a verdict. Of two numbers it first tries the operations, up to the one that
gives the target, as the paper's prompt looks ahead:

    27:[22, 5]
    22+5=27
    sure

A state stands by itself, as in the paper's prompts: how it was reached is not shown. Model text is data: readers count
what they drop under a reason and never raise.
"""

import functools
import random
import re
from collections.abc import Callable, Sequence

from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import NUMBER, Problem
from apr_jax.tasks.dialect import IMPOSSIBLE, LIKELY, SURE, VALUES, Proposal

Numbers = tuple[int, ...]

_STATES_PER_LEVEL = 3  # that a demonstration goes on from
_PROPOSAL = re.compile(
    rf"Exploring Operation: {NUMBER}[-+*/]{NUMBER}={NUMBER}, Resulting Numbers: \[({NUMBER}(?:, {NUMBER})*)\]"
)


def proposer_prompt(target: int, numbers: Sequence[int]) -> str:
    """Return the prompt for the operations on a state."""
    return trace.state_line(target, numbers, "")


def evaluator_prompt(target: int, numbers: Sequence[int]) -> str:
    """Return the prompt for the verdict on a state."""
    return f"{target}:{list(numbers)}\n"


def read_proposals(text: str, numbers: Sequence[int]) -> tuple[list[Proposal], list[str]]:
    """Read the proposals in what a proposer wrote about a state, and why each other line was dropped.

    Reasons: unfinished_line (no newline at its end), malformed_line, wrong_count (the operation must leave one number
    less), repeated_line. Arithmetic is not judged: a wrong line leads to a wrong answer.
    """
    *lines, unfinished = text.split("\n")
    proposals: dict[str, Proposal] = {}
    dropped = []
    for line in lines:
        match = _PROPOSAL.fullmatch(line)
        left = tuple(map(int, match[1].split(", "))) if match else ()
        if match is None:
            dropped.append("malformed_line")
        elif len(left) != len(numbers) - 1:
            dropped.append("wrong_count")
        elif line in proposals:
            dropped.append("repeated_line")
        else:
            proposals[line] = Proposal(line, left)
    return list(proposals.values()), dropped + ["unfinished_line"] * bool(unfinished)


def read_verdict(text: str) -> str | None:
    """Read the verdict that an evaluator's text ends in; None where its last line is none."""
    *_, last, end = ["", *text.split("\n")]
    return last if last in VALUES and not end else None


def render_answer(lines: Sequence[str], target: int) -> str:
    """Return the path of proposals that ends in the target, as `rules.verify` reads it."""
    return "\n".join([*lines, trace.goal_line(target).rstrip("\n")])


@functools.lru_cache(maxsize=1 << 16)
def verdict(numbers: Numbers, target: int) -> str:
    """Return the exhaustive solver's verdict on a state.

    One number: sure if it is the target, else impossible. Two: sure if one operation gives the target, else impossible.
    More: impossible if no sequence of operations gives it, likely if all that do begin with the same operation, sure if
    there are several beginnings.
    """
    if len(numbers) == 1:
        return SURE if numbers[0] == target else IMPOSSIBLE
    if not rules.is_solvable(numbers, target):
        return IMPOSSIBLE
    if len(numbers) == 2:
        return SURE
    ways = sum(rules.is_solvable(proposal.state, target) for proposal in proposals_of(numbers))
    return LIKELY if ways == 1 else SURE


def proposals_of(numbers: Numbers) -> list[Proposal]:
    """Return all operations on a state of at least two numbers, by pair and then + - * /; each line once."""
    lines: dict[str, Proposal] = {}
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            for result, operation in rules.operations(numbers[i], numbers[j]):
                left = (*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :], result)
                line = f"Exploring Operation: {operation}, Resulting Numbers: {list(left)}"
                lines.setdefault(line, Proposal(line, left))
    return list(lines.values())


def tree_calls(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    count_tokens: Callable[[str], int] | None,
    *,
    budget: bool,
) -> tuple[Call, ...]:
    """Return what perfect proposers and evaluators write in a breadth-first search, level by level.

    Every state that a level reaches is judged. The next level goes on from three of them, drawn at random, those that
    can be solved first: the rest of what a search meets is like them. Raises ValueError where a budget is asked for.
    """
    if budget:
        raise ValueError("tree_of_thoughts has no prompt to name a budget in: set data.condition_on_budget=False")
    calls, level = [], [problem.numbers]
    for _ in range(len(problem.numbers) - 1):
        reached: dict[Numbers, Numbers] = {}
        for numbers in level:
            proposals = proposals_of(numbers)
            written = "".join(f"{proposal.line}\n" for proposal in proposals)
            calls.append(_call(proposer_prompt(problem.target, numbers), written))
            for proposal in proposals:
                reached.setdefault(tuple(sorted(proposal.state)), proposal.state)
        states = list(reached.values())
        calls += [_call(evaluator_prompt(problem.target, state), _judgement(state, problem.target)) for state in states]
        drawn = sorted(rng.sample(states, len(states)), key=lambda state: verdict(state, problem.target) == IMPOSSIBLE)
        level = [state for state in states if state in drawn[:_STATES_PER_LEVEL]]
    return tuple(calls)


def demonstrated_answer(problem: Problem, calls: Sequence[Call]) -> str | None:
    """Return the first path of a demonstration's proposals that ends in the target; None where none does."""
    written = {call.context: call.completion for call in calls}
    level: dict[Numbers, tuple[Numbers, list[str]]] = {problem.numbers: (problem.numbers, [])}
    for _ in range(len(problem.numbers) - 1):
        reached: dict[Numbers, tuple[Numbers, list[str]]] = {}
        for numbers, lines in level.values():
            proposals, _ = read_proposals(written.get(proposer_prompt(problem.target, numbers), ""), numbers)
            for proposal in proposals:
                reached.setdefault(tuple(sorted(proposal.state)), (proposal.state, [*lines, proposal.line]))
        level = reached
    leaf = level.get((problem.target,))
    return None if leaf is None else render_answer(leaf[1], problem.target)


def _judgement(numbers: Numbers, target: int) -> str:
    tried = []
    if len(numbers) == 2:
        for result, operation in rules.operations(*numbers):
            tried.append(f"{operation}\n")
            if result == target:
                break
    return "".join([*tried, f"{verdict(numbers, target)}\n"])


def _call(context: str, completion: str) -> Call:
    return Call(context, completion, depth=1, ends_in_spawn=False, replay_start=len(completion))
