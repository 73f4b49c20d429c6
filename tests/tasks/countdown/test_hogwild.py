"""Two workers' demonstrations: they share the work, find every solution, and act on what they can have seen only."""

import dataclasses
import itertools
import random
import re

import pytest

from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.tasks.countdown import hogwild, rules, trace
from apr_jax.tasks.countdown.hogwild import HOGWILD, LEAVE
from apr_jax.tasks.countdown.rules import Problem, sample_problem
from apr_jax.tasks.countdown.search import Search
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import DEPTH_FIRST, LAPTOP, REFERENCE

TOKENIZER = load_tokenizer("builtin")
GOAL_TOKEN = " equal: Goal Reached\n"


def count_tokens(text):
    return len(TOKENIZER.encode(text))


def calls_of(problem):
    return demonstrate(problem, random.Random(0), LAPTOP, "hogwild", False, count_tokens).calls


def problems(count, task=LAPTOP):
    return [sample_problem(random.Random(seed), task) for seed in range(count)]


def test_every_solvable_problem_is_solved_and_the_work_is_shared():
    alone = shared = 0
    for problem in problems(150):
        demo = demonstrate(problem, random.Random(0), LAPTOP, "hogwild", False, count_tokens)
        assert demo.correct
        first, second = demo.calls
        assert first.context == HOGWILD.prompt(problem) + HOGWILD.header(0)
        assert second.context == HOGWILD.prompt(problem) + HOGWILD.header(1)
        solving = min(
            count_tokens(call.completion[: call.replay_start])
            for call in demo.calls
            if call.replay_start < len(call.completion)
        )
        branches = hogwild._branches(Search(problem, random.Random(0), LAPTOP), LAPTOP)
        for step in itertools.chain.from_iterable(branches):
            alone += count_tokens(step.text)
            if step.replay is not None:
                break
        shared += solving
    assert shared < 0.8 * alone, "two find a solution sooner than one"


@pytest.mark.parametrize("problem", problems(40))
def test_workers_act_on_what_they_have_seen(problem):
    """Whoever leaves saw the other's goal at its last line's end, and not yet at the end of the operation before."""
    calls = calls_of(problem)
    pieces = [TOKENIZER.token_texts(TOKENIZER.encode(call.completion)) for call in calls]
    goals = [texts.index(GOAL_TOKEN) + 1 if GOAL_TOKEN in texts else None for texts in pieces]
    assert any(goal is not None for goal in goals)
    for worker, call in enumerate(calls):
        other_goal = goals[1 - worker]
        if call.completion.endswith(LEAVE):
            searched = call.completion.removesuffix(LEAVE)
            assert goals[worker] is None
            assert count_tokens(searched) >= other_goal
            before = searched.rpartition("Exploring Operation")[0]
            assert not searched or count_tokens(before) < other_goal
        elif goals[worker] is not None:
            assert call.completion[call.replay_start :].startswith(trace.move_line("0"))
            answer = trace.read_answer(call.context + call.completion)
            assert rules.verify(answer, problem).correct


def test_where_there_is_no_solution_the_workers_meet_having_tried_every_operation():
    problem = Problem((2, 3, 7), 199)
    texts = [call.completion for call in calls_of(problem)]
    assert all(text.endswith(trace.NO_SOLUTION) for text in texts)
    firsts = [operation for _, operation, _ in rules.steps(problem.numbers)]
    tried = [[op for op in firsts if f"Exploring Operation: {op}, Resulting Numbers: [" in text] for text in texts]
    assert set(tried[0]) | set(tried[1]) == set(firsts)
    assert len(tried[0]) + len(tried[1]) <= len(firsts) + 1


def test_four_numbers_are_searched_depth_first():
    demos = [
        demonstrate(problem, random.Random(0), REFERENCE, "hogwild", False, count_tokens)
        for problem in problems(5, REFERENCE)
    ]
    assert all(demo.correct for demo in demos)


def test_with_bounds_and_attempts_the_lines_are_those_of_other_searches():
    """Depth-first, what the first worker writes for itself is what serial search writes, up to where they meet."""
    for problem in problems(12, DEPTH_FIRST):
        demo = demonstrate(problem, random.Random(0), DEPTH_FIRST, "hogwild", False, count_tokens)
        serial = demonstrate(problem, random.Random(0), DEPTH_FIRST, "serial", False)
        assert demo.correct == serial.correct
        first, second = demo.calls
        searched = first.completion[: first.replay_start].removesuffix(LEAVE).removesuffix(trace.NO_SOLUTION)
        assert serial.calls[0].completion.startswith(searched)
        results = re.findall(r"Exploring Operation: \d+[-+*/]\d+=(\d+), Res", first.completion + second.completion)
        assert max(map(int, results)) <= DEPTH_FIRST.max_result
        for call in demo.calls:
            if call.replay_start < len(call.completion) and DEPTH_FIRST.parent_replay == "child":
                assert re.match(r"Moving to Node #0,\d+\n", call.completion[call.replay_start :])


def test_short_lines_have_bounds_and_attempts_too():
    task = dataclasses.replace(DEPTH_FIRST, search_order="breadth_first", restate=False)
    texts = ""
    for problem in problems(12, task):
        demo = demonstrate(problem, random.Random(0), task, "hogwild", False, count_tokens)
        assert demo.correct == demonstrate(problem, random.Random(0), task, "serial", False).correct
        texts += "".join(call.completion for call in demo.calls)
    assert re.search(r"^Exploring Operation: \d+\*\d+$", texts, re.MULTILINE)
    assert re.search(r"^Exploring Operation: \d+/\d+, \d+\*\d+=\d+,\d+ unequal: No Solution$", texts, re.MULTILINE)
    assert max(map(int, re.findall(r"\d+[-+*/]\d+=(\d+), Res", texts))) <= task.max_result


def test_what_it_cannot_do_is_refused():
    problem = Problem((2, 3), 5)
    with pytest.raises(ValueError, match="count_tokens"):
        demonstrate(problem, random.Random(0), LAPTOP, "hogwild", False)
    with pytest.raises(ValueError, match="condition_on_budget"):
        demonstrate(problem, random.Random(0), LAPTOP, "hogwild", True, count_tokens)
