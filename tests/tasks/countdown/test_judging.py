"""Counting operations, and judging what children hand back."""

import pytest

from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.judging import count_operations, path_solves
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from tests.reasoning.test_adaptive import LAST, PROBLEM, STATE_6_4


def test_count_operations_reads_whole_lines_only():
    text = (
        "Exploring Operation: 3+2=5, Resulting Numbers: [4, 5]\n"
        "Generated Node #0,0: 24:[4, 5] Operation: 3+2=6\n"  # a copy, not counted
        "Exploring Operation: 3*4=13, Resulting Numbers: [13]\n"  # wrong
        "Exploring Operation: 2-4=2, Resulting Numbers: [2]\n"  # the larger comes first
        "Exploring Operation: 9/2=4, Resulting Numbers: [4]\n"  # does not divide
        "Exploring Operation: 8/2=4, Resulting Numbers: [4]\n"
        "Exploring Operation: 8//2, Resulting Numbers: [4]\n"  # no operation
        "Exploring Operation: 7-4=3"  # cut off
    )
    assert count_operations(text) == (6, 2)


def test_of_attempts_the_products_count():
    lines = [
        "57*20",  # beyond the bound: no operation
        "57/0",
        "57/20, 20*2=40,57 unequal: No Solution",
        "57/19, 19*3=57,57",
        "57/19=3, Resulting Numbers: [3]",
        "57/20, 20*2=45,57 unequal: No Solution",  # wrong
        "57/20, 20*2=40,58 unequal: No Solution",  # compared with another number
        "57/20, ",
    ]
    assert count_operations("".join(f"Exploring Operation: {line}\n" for line in lines)) == (6, 3)


def test_path_solves_counts_the_operations_before_the_child():
    path = (STATE_6_4 + LAST).rstrip("\n")
    assert path_solves(path, PROBLEM)
    assert not path_solves(path, Problem((2, 5, 4), 24))  # 2*3 needs a 3
    assert not path_solves(path.replace("2*3=6", "2+3=6"), PROBLEM)
    assert not path_solves(path.replace("4*6=24", "4*6=25"), PROBLEM)
    assert not path_solves("no path at all", PROBLEM)


def test_a_childs_result_is_one_word():
    assert COUNTDOWN.dialects["adaptive"].child_result(STATE_6_4, "No solution found.\n", PROBLEM) == "no_solution"
    assert COUNTDOWN.dialects["adaptive"].child_result(STATE_6_4, "No solution", PROBLEM) == "unfinished"
    assert COUNTDOWN.dialects["tree_of_thoughts"].child_result("", "no verdict", PROBLEM) == "proposed"


@pytest.mark.parametrize(
    ("completion", "result"),
    [
        ("Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n" + STATE_6_4 + LAST, "solved"),
        ("Exploring Operation: 2+3=6, Resulting Numbers: [4, 6]\n" + STATE_6_4 + LAST, "wrong_path"),
        (LAST, "wrong_path"),  # 6 is no number of the problem
        ("Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n" + STATE_6_4, "unfinished"),
    ],
)
def test_a_sample_of_direct_is_its_path(completion: str, result: str):
    direct = COUNTDOWN.dialects["direct"]
    assert direct.child_result(ADAPTIVE.prompt(PROBLEM), completion.rstrip("\n"), PROBLEM) == result
