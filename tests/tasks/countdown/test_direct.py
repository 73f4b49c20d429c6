"""Demonstrations of direct: a right path for every problem, and nothing but that."""

import dataclasses
import random

import pytest

from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.tasks.countdown.rules import Problem, sample_problem
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import LAPTOP, REFERENCE

TOKENIZER = load_tokenizer("builtin")


def demonstration(problem, task=LAPTOP, seed=0):
    return demonstrate(problem, random.Random(seed), task, "direct", condition_on_budget=False)


@pytest.mark.parametrize("task", [LAPTOP, REFERENCE], ids=["laptop", "reference"])
def test_every_problem_is_solved_with_one_operation_a_number_less_one(task):
    rng = random.Random(0)
    for seed in range(40):
        problem = sample_problem(rng, task)
        demo = demonstration(problem, task, seed)
        assert demo.correct, (problem, demo.answer)
        (call,) = demo.calls
        assert call.completion.count("Exploring Operation") == len(problem.numbers) - 1
        assert call.completion.count("Moving to Node") == len(problem.numbers) - 2
        assert demo.answer == (call.context + call.completion).strip()
        TOKENIZER.encode(call.context + call.completion)


def test_the_text_of_a_demonstration():
    (call,) = demonstration(Problem((2, 3, 4), 24)).calls
    assert call.context == "Moving to Node #0\nCurrent State: 24:[2, 3, 4], Operations: []\n"
    assert call.completion == (
        "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n"
        "Generated Node #0,0: 24:[4, 6] Operation: 2*3=6\n"
        "Moving to Node #0,0\n"
        "Current State: 24:[4, 6], Operations: ['2*3=6']\n"
        "Exploring Operation: 4*6=24, Resulting Numbers: [24]\n"
        "24,24 equal: Goal Reached\n"
    )
    assert call.replay_start == len(call.completion), "no part of it is a replay of a search"


def test_shuffled_solutions_differ_and_fixed_ones_do_not():
    problem = Problem((2, 3, 4), 24)
    shuffled = dataclasses.replace(LAPTOP, shuffle=True)
    assert len({demonstration(problem, shuffled, seed).answer for seed in range(20)}) > 2
    assert len({demonstration(problem, LAPTOP, seed).answer for seed in range(20)}) == 1


def test_what_has_no_solution_or_no_budget_is_refused():
    with pytest.raises(ValueError, match="7 cannot be made of"):
        demonstration(Problem((2, 2), 7))
    with pytest.raises(ValueError, match="name no budget"):
        demonstrate(Problem((2, 3), 5), random.Random(0), LAPTOP, "direct", condition_on_budget=True)
