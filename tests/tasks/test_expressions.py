"""`express` reads what `verify` reads: no answer that is accepted is lost on the way to people."""

import random

import pytest

from apr_jax.library import Policy
from apr_jax.tasks import TASKS
from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import LAPTOP, REFERENCE

PROBLEM = Problem((51, 54, 28, 1), 24)
STEPS = (
    "Exploring Operation: 54-51=3, Resulting Numbers: [28, 1, 3]",
    "Exploring Operation: 28-3=25, Resulting Numbers: [1, 25]",
    "Exploring Operation: 25-1=24, Resulting Numbers: [24]",
)
GOAL = "24,24 equal: Goal Reached"
EXPRESSION = "28-(54-51)-1"
PIECES = [*STEPS, GOAL, "Exploring Operation", "\n", "\r", "\x0b", "\u2028", " ", "[", "]", "0", "9", "=", "9" * 5000]


@pytest.mark.parametrize(
    "lines",
    [
        STEPS,
        (f"so {STEPS[0]}", *STEPS),  # in the middle of a line
        (STEPS[0], f" {STEPS[0]}", *STEPS[1:]),
        (STEPS[0] + ", [1]", *STEPS[1:]),
        (f"{STEPS[0][:-1]} {STEPS[1]}]", *STEPS[1:]),  # one operation within another's list
        (STEPS[0], "Moving to Node #0,1 " + STEPS[1] * 3, *STEPS[1:]),
        (STEPS[0].replace("]", "\u2028]"), *STEPS[1:]),
        (STEPS[0].replace("]", "\r]"), *STEPS[1:]),
        (*STEPS, "\x85" + STEPS[2]),
    ],
)
def test_an_answer_with_odd_lines_is_expressed_as_it_was_verified(lines):
    answer = "\n".join([*lines, GOAL])
    assert rules.verify(answer, PROBLEM).correct
    assert rules.express(answer, PROBLEM) == EXPRESSION


def test_every_mutated_trace_that_is_accepted_is_expressed():
    """Each expression evaluates to the target."""
    rng, accepted = random.Random(0), 0
    for section in (LAPTOP, REFERENCE):
        for method in ("adaptive", "serial", "direct", "pasta", "hogwild"):
            for _ in range(30):
                problem = rules.sample_problem(rng, section)
                answer = demonstrate(problem, rng, section, method, False, len).answer
                for _ in range(40 if answer else 0):
                    mutated = _mutated(answer, rng)
                    if rules.verify(mutated, problem).correct:
                        accepted += 1
                        assert eval(rules.express(mutated, problem).replace("/", "//")) == problem.target
                        assert rules.canonical_path(mutated)
    assert accepted > 1000


def _mutated(text, rng):
    """The text with one to three places cut, doubled, moved, or filled with something else."""
    for _ in range(rng.randint(1, 3)):
        first, last = sorted(rng.choices(range(len(text) + 1), k=2))
        last = min(last, first + rng.choice((0, 1, 5, 80)))
        piece = rng.choice((rng.choice(PIECES), text[first:last] * 2, f"{rng.choice(text)}\n"))
        text = text[:first] + piece + text[last:]
    return text


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("answer", ["", "9" * 5000, "[" * 100_000, "\ud800", "\0", "Exploring Operation: ", "5\n"])
def test_no_answer_whatever_it_is_makes_a_task_raise(task, answer):
    if task.name == "gym":
        pytest.importorskip("reasoning_gym", reason="the extra [gym]")
    problem = task.read_words(task.example.split())
    is_right = task.name == "traces" and answer == "5\n"  # the example's answer, and space around it does not count
    assert task.verify(answer, problem).correct == is_right
    task.vote(answer)
    task.claims_answer(answer)
    task.count_operations(answer)
    task.path_solves(answer, problem)
    for dialect in task.dialects.values():
        dialect.child_result(answer, answer, problem)


def test_an_answer_that_a_task_cannot_express_stands_as_it_was_written(caplog):
    class Clumsy(Countdown):
        def express(self, answer, problem):
            raise IndexError("list index out of range")

    class Own(Policy):
        task = Clumsy()

    assert Own(None, None, {})._expression("the answer", PROBLEM) == "the answer"
    assert "cannot express" in caplog.text
