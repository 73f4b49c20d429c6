"""Tree of Thoughts on Countdown: two short prompts, and demonstrations of both (Yao et al., arXiv 2305.10601, 4.1).

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

With `task.attempts` a proposer writes attempts, too, which propose nothing, and an evaluator writes what a search would
(`search.py`): of two numbers what stands below them, of one the comparison with the target:

    Exploring Operation: 22+5=27, Resulting Numbers: [27]      27,27 equal: Goal Reached
    27,27 equal: Goal Reached                                  sure
    sure

A state stands by itself, as in the paper's prompts: how it was reached is not shown. Model text is data: readers count
what they drop under a reason and never raise.
"""

import functools
import random
import re
from collections.abc import Hashable, Sequence

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import NUMBER, Problem
from apr_jax.tasks.countdown.search import usable_steps
from apr_jax.tasks.countdown.trace import NUMBERS, OPERATION
from apr_jax.tasks.dialect import IMPOSSIBLE, LIKELY, SURE, VALUES, Proposal, ThoughtDialect

Numbers = tuple[int, ...]

_STATES_PER_LEVEL = 3  # that a demonstration goes on from
_PROPOSAL = re.compile(rf"Exploring Operation: {OPERATION}, Resulting Numbers: \[({NUMBERS})\]")
_ATTEMPT = re.compile(
    rf"Exploring Operation: {NUMBER}[-+*/]{NUMBER}(?:, {OPERATION},{NUMBER}(?: unequal: No Solution)?)?"
)


class Thoughts(ThoughtDialect):
    """Operations on the numbers that are left are proposed, and what is then left is judged. A state is its numbers."""

    def root(self, problem: Problem) -> Numbers:
        return problem.numbers

    def steps_left(self, state: Numbers) -> int:
        return len(state) - 1

    def key(self, state: Numbers) -> Hashable:
        return tuple(sorted(state))

    def proposer_prompt(self, problem: Problem, state: Numbers) -> str:
        return trace.state_line(problem.target, state, "")

    def evaluator_prompt(self, problem: Problem, state: Numbers) -> str:
        return f"{problem.target}:{list(state)}\n"

    def read_proposals(self, text: str, state: Numbers) -> tuple[list[Proposal], list[str]]:
        """Read what a proposer wrote about a state.

        Reasons: unfinished_line (no newline at its end), malformed_line, wrong_count (the operation must leave one
        number less), repeated_line. Arithmetic is not judged: a wrong line leads to a wrong answer. Attempts are
        neither proposals nor dropped.
        """
        *lines, unfinished = text.split("\n")
        proposals: dict[str, Proposal] = {}
        dropped = []
        for line in lines:
            if _ATTEMPT.fullmatch(line):
                continue
            match = _PROPOSAL.fullmatch(line)
            left = tuple(map(int, match[1].split(", "))) if match else ()
            if match is None:
                dropped.append("malformed_line")
            elif len(left) != len(state) - 1:
                dropped.append("wrong_count")
            elif line in proposals:
                dropped.append("repeated_line")
            else:
                proposals[line] = Proposal(line, left)
        return list(proposals.values()), dropped + ["unfinished_line"] * bool(unfinished)

    def read_value(self, text: str) -> float | None:
        return VALUES.get(read_verdict(text) or "")

    def render_answer(self, problem: Problem, lines: Sequence[str], state: Numbers) -> str | None:
        if state != (problem.target,):
            return None
        return "\n".join([*lines, trace.goal_line(problem.target).rstrip("\n")])

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        return read_verdict(completion) or "proposed"

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: CountdownConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Return what perfect proposers and evaluators write in a breadth-first search, level by level.

        Every state that a level reaches is judged. The next level goes on from three of them, drawn at random, those
        that can be solved first: the rest of what a search meets is like them.
        """
        target = problem.target
        calls, level = [], [problem.numbers]
        for _ in range(len(problem.numbers) - 1):
            reached: dict[Hashable, Numbers] = {}
            for numbers in level:
                proposals, written = _proposals(numbers, section)
                calls.append(_call(self.proposer_prompt(problem, numbers), written))
                for proposal in proposals:
                    reached.setdefault(self.key(proposal.state), proposal.state)
            states = list(reached.values())
            calls += [
                _call(self.evaluator_prompt(problem, state), _judgement(state, target, section)) for state in states
            ]
            drawn = rng.sample(states, len(states))
            drawn.sort(key=lambda state: verdict(state, target, section) == IMPOSSIBLE)
            level = [state for state in states if state in drawn[:_STATES_PER_LEVEL]]
        return tuple(calls)

    def demonstrated_answer(self, problem: Problem, calls: Sequence[Call]) -> str | None:
        written = {call.context: call.completion for call in calls}
        level: dict[Hashable, tuple[Numbers, list[str]]] = {problem.numbers: (problem.numbers, [])}
        for _ in range(len(problem.numbers) - 1):
            reached: dict[Hashable, tuple[Numbers, list[str]]] = {}
            for numbers, lines in level.values():
                proposals, _ = self.read_proposals(written.get(self.proposer_prompt(problem, numbers), ""), numbers)
                for proposal in proposals:
                    reached.setdefault(self.key(proposal.state), (proposal.state, [*lines, proposal.line]))
            level = reached
        leaf = level.get((problem.target,))
        return None if leaf is None else self.render_answer(problem, leaf[1], leaf[0])


def read_verdict(text: str) -> str | None:
    """Read the verdict that an evaluator's text ends in; None where its last line is none."""
    *_, last, end = ["", *text.split("\n")]
    return last if last in VALUES and not end else None


@functools.lru_cache(maxsize=1 << 16)
def verdict(numbers: Numbers, target: int, section: CountdownConfig) -> str:
    """Return the exhaustive solver's verdict on a state; with `task.max_result` no result may be larger.

    One number: sure if it is the target, else impossible. Two: sure if one operation gives the target, else impossible.
    More: impossible if no sequence of operations gives it, likely if all that do begin with the same operation, sure if
    there are several beginnings.
    """
    if not _is_solvable(numbers, target, section):
        return IMPOSSIBLE
    if len(numbers) <= 2:
        return SURE
    proposals, _ = _proposals(numbers, section)
    ways = sum(_is_solvable(proposal.state, target, section) for proposal in proposals)
    return LIKELY if ways == 1 else SURE


@functools.lru_cache(maxsize=1 << 16)
def _is_solvable(numbers: Numbers, target: int, section: CountdownConfig) -> bool:
    """Tell whether operations that may be proposed give the target."""
    if len(numbers) == 1:
        return numbers[0] == target
    if not section.max_result:
        return rules.is_solvable(numbers, target)
    return any(_is_solvable(proposal.state, target, section) for proposal in _proposals(numbers, section)[0])


@functools.lru_cache(maxsize=1 << 16)
def _proposals(numbers: Numbers, section: CountdownConfig) -> tuple[tuple[Proposal, ...], str]:
    """Return all operations on a state of at least two numbers, each line once, and what a proposer writes."""
    steps, attempts = usable_steps(numbers, section)
    lines: dict[str, Proposal] = {}
    written = []
    for step in steps:
        left = step.leaves(numbers)
        line = f"Exploring Operation: {step.operation}, Resulting Numbers: {left}"
        written.append(step.before)
        if line not in lines:
            lines[line] = Proposal(line, tuple(left))
            written.append(f"{line}\n")
    return tuple(lines.values()), "".join([*written, attempts])


def _judgement(numbers: Numbers, target: int, section: CountdownConfig) -> str:
    tried = [trace.outcome_line(target, *numbers)] if len(numbers) == 1 and section.attempts else []
    steps, attempts = usable_steps(numbers, section) if len(numbers) == 2 else ([], "")
    for step in steps:
        in_full = trace.final_lines(target, step.result, step.operation)
        tried.append(step.before + (in_full if section.attempts else f"{step.operation}\n"))
        if step.result == target:
            break
    else:
        tried.append(attempts)
    return "".join([*tried, f"{verdict(numbers, target, section)}\n"])


def _call(context: str, completion: str) -> Call:
    return Call(context, completion, depth=1, ends_in_spawn=False, replay_start=len(completion))


THOUGHTS = Thoughts()
