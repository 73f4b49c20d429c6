import ast
import dataclasses
import itertools
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.config import ConfigError
from apr_jax.tasks.base import Verdict
from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.rules import Problem, is_solvable, operations, sample_problem, verify
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import LAPTOP, REFERENCE

PROBLEM = Problem((51, 54, 28, 1), 24)
STEPS = (
    "Exploring Operation: 54-51=3, Resulting Numbers: [28, 1, 3]",
    "Exploring Operation: 28-3=25, Resulting Numbers: [1, 25]",
    "Exploring Operation: 25-1=24, Resulting Numbers: [24]",
)
GOAL = "24,24 equal: Goal Reached"


def _answer(*lines: str) -> str:
    return "\n".join(["Moving to Node #0", "Current State: 24:[51, 54, 28, 1], Operations: []", *lines])


def test_a_problem_is_the_same_in_any_order() -> None:
    assert Problem((3, 1, 2), 6).key == Problem((1, 2, 3), 6).key == ((1, 2, 3), 6)
    assert Problem((1, 2, 3), 6).key != Problem((1, 2, 3), 7).key


@pytest.mark.parametrize(
    ("numbers", "target", "message"),
    [
        ((5,), 5, "at least 2 numbers"),
        ((5, -1), 4, "must not be negative"),
        ((5, 1.0), 4, "tuple of ints"),
        ((5, True), 4, "tuple of ints"),
        ([5, 1], 4, "tuple of ints"),
        ((5, 1), 0, "positive int"),
        ((5, 1), "4", "positive int"),
    ],
)
def test_malformed_problems_are_refused(numbers: object, target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(numbers, target)  # type: ignore[arg-type]


def test_a_right_answer_is_correct() -> None:
    assert verify(_answer(*STEPS, GOAL), PROBLEM) == Verdict(True, "correct")
    assert verify(_answer(*STEPS, GOAL, "Exit Sub Search at level 2", "Exit Sub Search at level 1"), PROBLEM).correct


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no_answer"),
        ("", "no_operations"),
        (GOAL, "no_operations"),
        (_answer(*STEPS), "goal_not_claimed"),
        (_answer(*STEPS, "24,24 unequal: No Solution"), "goal_not_claimed"),
        (_answer(*STEPS, "25,25 equal: Goal Reached"), "goal_not_claimed"),
        (_answer(*STEPS, GOAL, "No solution found."), "goal_not_claimed"),
        (_answer(STEPS[0], STEPS[2], GOAL), "number_not_available"),
        (_answer(STEPS[0], STEPS[1], GOAL), "numbers_left_over"),
        (_answer(*STEPS, STEPS[2], GOAL), "number_not_available"),
        (_answer(STEPS[0], STEPS[0], STEPS[1], STEPS[2], GOAL), "number_not_available"),
        (_answer(STEPS[0].replace("=3", "=4"), *STEPS[1:], GOAL), "wrong_arithmetic"),
        (_answer(STEPS[0].replace("54-51=3", "51-54=3"), *STEPS[1:], GOAL), "wrong_arithmetic"),
        (_answer(STEPS[0].replace("54-51=3", "54/51=3"), *STEPS[1:], GOAL), "wrong_arithmetic"),
        (_answer(*STEPS[:2], STEPS[2].replace("25-1=24", "25*1=25"), GOAL), "target_missed"),
        (_answer(STEPS[0].replace("54-51=3", "54-51=03"), *STEPS[1:], GOAL), "malformed_operation"),
        (_answer(STEPS[0].replace("54-51=3", "54--51=3"), *STEPS[1:], GOAL), "malformed_operation"),
        (_answer(STEPS[0].replace("54-51=3", "54-51=3.0"), *STEPS[1:], GOAL), "malformed_operation"),
        (_answer(STEPS[0].replace("54", "5\u0664"), *STEPS[1:], GOAL), "malformed_operation"),
        (_answer(STEPS[0].replace("54-51=3", "54-51=" + "3" * 5000), *STEPS[1:], GOAL), "malformed_operation"),
        (_answer(STEPS[0].replace("54-51=3", "__import__('os').abort()"), *STEPS[1:], GOAL), "malformed_operation"),
        (_answer(" " + STEPS[0], *STEPS[1:], GOAL), "number_not_available"),
    ],
)
def test_wrong_answers_have_reasons(answer: str | None, reason: str) -> None:
    assert verify(answer, PROBLEM) == Verdict(False, reason)


LISTED = "Moving to Node #0,1\nCurrent State: 24:[1, 25], Operations: ['54-51=3', '28-3=25']"


def test_an_answer_that_begins_below_the_root_has_made_the_operations_that_its_state_lists() -> None:
    answer = "\n".join([LISTED, STEPS[2], GOAL])
    assert verify(answer, PROBLEM) == Verdict(True, "correct")
    assert rules.express(answer, PROBLEM) == rules.express(_answer(*STEPS, GOAL), PROBLEM)
    assert rules.canonical_path(answer) == rules.canonical_path(_answer(*STEPS, GOAL))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("54-51=3", "54-51=4", "wrong_arithmetic"),
        ("54-51=3", "53-50=3", "number_not_available"),
        ("'54-51=3', ", "", "number_not_available"),
        ("54-51=3", "54-51", "malformed_operation"),
        ("'54-51=3'", "54-51=3", "malformed_operation"),
        ("#0,1", "#0", "number_not_available"),  # at the root nothing has been done
        ("#0,1", "#1,1", "number_not_available"),
        ("Moving", "\nMoving", "number_not_available"),
    ],
)
def test_wrongly_listed_operations_have_reasons(old: str, new: str, reason: str) -> None:
    answer = "\n".join([LISTED.replace(old, new), STEPS[2], GOAL])
    assert verify(answer, PROBLEM) == Verdict(False, reason)


def test_a_division_by_zero_is_wrong_arithmetic() -> None:
    answer = (
        "Exploring Operation: 5-5=0, Resulting Numbers: [6, 6, 0]\n"
        "Exploring Operation: 6-6=0, Resulting Numbers: [0, 0]\n"
        "Exploring Operation: 0/0=7, Resulting Numbers: [7]\n7,7 equal: Goal Reached"
    )
    assert verify(answer, Problem((5, 5, 6, 6), 7)).reason == "wrong_arithmetic"


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*STEPS, GOAL, "", "\n", "Exploring Operation"])).map("\n".join))
def test_any_text_gets_a_verdict(answer: str) -> None:
    verdict = verify(answer, PROBLEM)
    assert verdict.correct == (verdict.reason == "correct")
    assert rules.claims_goal(answer) in (True, False)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.data())
def test_what_is_called_correct_evaluates_to_the_target(seed: int, small: bool, data: st.DataObject) -> None:
    """An answer with one character changed is either refused or still a true solution."""
    rng = random.Random(seed)
    begins = data.draw(st.sampled_from(["root", "child"]))
    task = dataclasses.replace(LAPTOP if small else REFERENCE, parent_replay=begins)
    demonstration = demonstrate(sample_problem(rng, task), rng, task, "adaptive", condition_on_budget=False)
    if demonstration.answer is None:
        return
    answer = demonstration.answer
    assert verify(answer, demonstration.problem).correct
    assert _is_solution(answer, demonstration.problem)
    index = data.draw(st.integers(0, len(answer) - 1))
    character = data.draw(st.sampled_from("0123456789+-*/=, \n"))
    mutated = answer[:index] + character + answer[index + 1 :]
    if verify(mutated, demonstration.problem).correct:
        assert _is_solution(mutated, demonstration.problem)


def test_operations_are_the_four_in_order() -> None:
    assert operations(4, 12) == ((16, "4+12=16"), (8, "12-4=8"), (48, "4*12=48"), (3, "12/4=3"))
    assert operations(12, 5) == ((17, "12+5=17"), (7, "12-5=7"), (60, "12*5=60"))
    assert operations(0, 3) == ((3, "0+3=3"), (3, "3-0=3"), (0, "0*3=0"))
    assert operations(0, 0) == ((0, "0+0=0"), (0, "0-0=0"), (0, "0*0=0"))


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=4), st.integers(1, 60))
def test_solvable_means_that_some_order_of_operations_gets_there(numbers: list[int], target: int) -> None:
    assert is_solvable(numbers, target) == (target in _reachable(numbers))


def test_sampled_problems_lie_in_the_ranges_and_can_be_solved() -> None:
    rng = random.Random(0)
    problems = [sample_problem(rng, LAPTOP) for _ in range(300)]
    assert all(is_solvable(problem.numbers, problem.target) for problem in problems)
    assert {n for problem in problems for n in problem.numbers} == set(range(1, 21))
    assert {problem.target for problem in problems} <= set(range(10, 41))
    assert {sample_problem(rng, LAPTOP, targets=(12, 30)).target for _ in range(50)} == {12, 30}


def test_a_task_without_solvable_problems_says_so() -> None:
    impossible = dataclasses.replace(LAPTOP, max_number=1, min_target=30)
    with pytest.raises(ConfigError, match=r"none of 10000 draws of 3 numbers in 1\.\.1 reaches a target in 30\.\.40"):
        sample_problem(random.Random(0), impossible)


def _reachable(numbers: list[int]) -> set[int]:
    if len(numbers) == 1:
        return set(numbers)
    reached: set[int] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        left, right = numbers[i], numbers[j]
        results = {left + right, left * right} | ({left - right} if left >= right else set())
        if right and left % right == 0:
            results.add(left // right)
        for result in results:
            reached |= _reachable([*rest, result])
    return reached


def _is_solution(answer: str, problem: Problem) -> bool:
    """An independent reading of an answer: plain lists, and Python's own operators."""
    numbers = list(problem.numbers)
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: a / b if b else None}
    below = re.match(r"Moving to Node #0,.*\nCurrent State: .*, Operations: \[(.*)\]\n", answer)
    listed = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", below[1] if below else "")
    explored = re.findall(r"^Exploring Operation: (\d+)(.)(\d+)=(\d+),", answer, re.MULTILINE)
    for left, operator, right, result in listed + explored:
        if compute[operator](int(left), int(right)) != int(result):
            return False
        for number in (left, right):
            if int(number) not in numbers:
                return False
            numbers.remove(int(number))
        numbers.append(int(result))
    return numbers == [problem.target]


def _path(*operations: str, target: int) -> str:
    lines = [f"Exploring Operation: {operation}, Resulting Numbers: []" for operation in operations]
    return "\n".join([*lines, f"{target},{target} equal: Goal Reached"])


@pytest.mark.parametrize(
    ("numbers", "operations", "expression"),
    [
        ((9, 3, 18), ("18-9=9", "3*9=27"), "3*(18-9)"),
        ((4, 2, 1), ("4-2=2", "2-1=1"), "4-2-1"),
        ((2, 7, 9), ("7-2=5", "9-5=4"), "9-(7-2)"),
        ((8, 2, 2), ("2*2=4", "8/4=2"), "8/(2*2)"),
        ((8, 4, 2, 3), ("8/4=2", "2*2=4", "4+3=7"), "2*8/4+3"),
        ((1, 2, 3, 4), ("1+2=3", "3+4=7", "3*7=21"), "(1+2)*(3+4)"),
    ],
)
def test_a_right_path_is_one_expression_with_the_brackets_that_it_needs(numbers, operations, expression):
    target = int(operations[-1].partition("=")[2])
    assert rules.express(_path(*operations, target=target), Problem(numbers, target)) == expression


def test_expressions_of_solver_paths_have_the_targets_value():
    checked = 0
    for seed in range(60):
        rng = random.Random(seed)
        demo = demonstrate(sample_problem(rng, LAPTOP), rng, LAPTOP, "adaptive", condition_on_budget=False)
        if demo.answer is None:
            continue
        text = rules.express(demo.answer, demo.problem)
        assert sorted(map(int, re.findall("[0-9]+", text))) == sorted(demo.problem.numbers)
        assert _value(ast.parse(text, mode="eval").body) == demo.problem.target
        checked += 1
    assert checked > 20


def test_a_wrong_answer_has_no_expression():
    with pytest.raises(ValueError, match="wrong_arithmetic"):
        rules.express(_path("4-2=3", target=3), Problem((4, 2), 3))


def test_departures_name_what_a_task_does_not_draw():
    assert rules.departures(Problem((1, 20, 3), 40), LAPTOP) == []
    assert rules.departures(Problem((1, 21), 9), LAPTOP) == [
        "2 numbers instead of 3",
        "numbers outside 1..20",
        "a target outside 10..40",
    ]


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    operators = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
    return left / right if isinstance(node.op, ast.Div) else operators[type(node.op)]
