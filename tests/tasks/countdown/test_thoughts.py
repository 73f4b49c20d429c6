import dataclasses
import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.base import Demonstration
from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem, sample_problem, verify
from apr_jax.tasks.countdown.thoughts import THOUGHTS, read_verdict, verdict
from apr_jax.tasks.dialect import VALUES, Proposal
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import DEPTH_FIRST, LAPTOP, REFERENCE


def _demonstrate(seed: int, task: CountdownConfig) -> Demonstration:
    rng = random.Random(seed)
    return demonstrate(sample_problem(rng, task), rng, task, "tree_of_thoughts", condition_on_budget=False)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([LAPTOP, REFERENCE]))
def test_every_demonstration_solves_its_problem(seed: int, task: CountdownConfig) -> None:
    demonstration = _demonstrate(seed, task)
    assert demonstration.correct
    assert all(call.depth == 1 and not call.ends_in_spawn for call in demonstration.calls)
    for call in demonstration.calls:
        if call.context.startswith("Current State"):
            numbers = tuple(map(int, call.context.partition(":[")[2].partition("]")[0].split(", ")))
            proposals, dropped = THOUGHTS.read_proposals(call.completion, numbers)
            assert "".join(f"{proposal.line}\n" for proposal in proposals) == call.completion
            assert dropped == []
            assert _operations(call.completion) == {
                text for pair in itertools.combinations(numbers, 2) for _, text in rules.operations(*pair)
            }
        else:
            assert read_verdict(call.completion) in VALUES


def _operations(text: str) -> set[str]:
    return {line.removeprefix("Exploring Operation: ").partition(",")[0] for line in text.splitlines()}


def test_an_evaluator_tries_two_numbers_up_to_the_operation_that_gives_the_target() -> None:
    written = {call.context: call.completion for call in _demonstrate_problem(Problem((2, 3, 4), 24)).calls}
    assert written["24:[4, 6]\n"] == "4+6=10\n6-4=2\n4*6=24\nsure\n"
    assert written["24:[4, 5]\n"] == "4+5=9\n5-4=1\n4*5=20\nimpossible\n"
    assert written["24:[24]\n"] == "sure\n"
    assert written["24:[10]\n"] == "impossible\n"


def _demonstrate_problem(problem: Problem) -> Demonstration:
    return demonstrate(problem, random.Random(0), LAPTOP, "tree_of_thoughts", condition_on_budget=False)


@pytest.mark.parametrize(
    ("numbers", "target", "expected"),
    [
        ((24,), 24, "sure"),
        ((23,), 24, "impossible"),
        ((4, 6), 24, "sure"),
        ((4, 5), 24, "impossible"),
        ((2, 3, 4), 24, "sure"),
        ((1, 1, 1), 24, "impossible"),
        ((5, 7, 9), 80, "likely"),  # (7+9)*5 and nothing else
    ],
)
def test_verdicts_are_the_exhaustive_solvers(numbers: tuple[int, ...], target: int, expected: str) -> None:
    assert verdict(numbers, target, LAPTOP) == expected


@pytest.mark.parametrize(
    ("numbers", "target", "expected"),
    [
        ((20, 20, 10), 40, "likely"),
        ((20, 20, 90), 4, "impossible"),
        ((16, 16, 6), 250, "impossible"),
        ((250, 4), 1000, "impossible"),
    ],
)
def test_a_bound_on_results_makes_states_impossible(numbers: tuple[int, ...], target: int, expected: str) -> None:
    assert verdict(numbers, target, dataclasses.replace(LAPTOP, max_result=255)) == expected


def test_attempts_are_written_as_searches_write_them_and_propose_nothing() -> None:
    problem = Problem((57, 20, 3), 40)
    demo = demonstrate(problem, random.Random(0), DEPTH_FIRST, "tree_of_thoughts", condition_on_budget=False)
    written = {call.context: call.completion for call in demo.calls}
    text = written[THOUGHTS.proposer_prompt(problem, (57, 20, 3))]
    assert "Exploring Operation: 57*20\nExploring Operation: 57/20, 20*2=40,57 unequal: No Solution\n" in text
    proposals, dropped = THOUGHTS.read_proposals(text, (57, 20, 3))
    assert dropped == []
    assert [proposal.line.split()[2] for proposal in proposals] == [
        "57+20=77,", "57-20=37,", "57+3=60,", "57-3=54,", "57*3=171,", "57/3=19,", "20+3=23,", "20-3=17,", "20*3=60,"
    ]  # fmt: skip
    assert written["40:[20, 60]\n"].endswith(
        "Exploring Operation: 60-20=40, Resulting Numbers: [40]\n40,40 equal: Goal Reached\nsure\n"
    )
    assert written["40:[3, 77]\n"].endswith("Exploring Operation: 77/3, 3*25=75,77 unequal: No Solution\nimpossible\n")
    assert written["40:[40]\n"] == "40,40 equal: Goal Reached\nsure\n"
    assert written["40:[80]\n"] == "80,40 unequal: No Solution\nimpossible\n"
    assert demo.correct


def test_what_is_dropped_has_a_reason() -> None:
    good = "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]"
    text = f"{good}\n{good}\n{good.replace('4, 6', '6')}\n{good}]\n\n{good[:-1]}"
    proposals, dropped = THOUGHTS.read_proposals(text, (2, 3, 4))
    assert proposals == [Proposal(good, (4, 6))]
    assert dropped == ["repeated_line", "wrong_count", "malformed_line", "malformed_line", "unfinished_line"]
    assert THOUGHTS.read_proposals("", (2, 3, 4)) == ([], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("sure\n", "sure"), ("4*6=24\nlikely\n", "likely"), ("sure", None), ("", None), ("sure\n4\n", None), ("\n", None)],
)
def test_a_verdict_is_the_last_line(text: str, expected: str | None) -> None:
    assert read_verdict(text) == expected


@given(st.text() | st.text(alphabet="[]\n,: 0123456789+-*/=ExploringOperationsurelikely"))
def test_any_text_can_be_read(text: str) -> None:
    read_verdict(text)
    proposals, dropped = THOUGHTS.read_proposals(text, (2, 3, 4))
    attempts = len(re.findall(r"^Exploring Operation: [0-9]+[-+*/][0-9]+(?:, .*)?$", text, re.MULTILINE))
    lines = text.count("\n") + (not text.endswith("\n") and bool(text))
    assert lines - attempts <= len(proposals) + len(dropped) <= lines


def test_an_answer_is_made_of_proposals() -> None:
    lines = [
        "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]",
        "Exploring Operation: 4*6=24, Resulting Numbers: [24]",
    ]
    problem = Problem((2, 3, 4), 24)
    assert verify(THOUGHTS.render_answer(problem, lines, (24,)), problem).correct
    assert THOUGHTS.render_answer(problem, lines, (23,)) is None


def test_there_is_no_budget_to_name() -> None:
    with pytest.raises(ValueError, match="name no budget"):
        demonstrate(Problem((2, 3, 4), 24), random.Random(0), LAPTOP, "tree_of_thoughts", condition_on_budget=True)
