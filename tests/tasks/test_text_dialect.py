"""The text dialect's grammar: what is read, every reason why something is not, and demonstrations of it."""

import dataclasses
import random

import pytest

from apr_jax.config_dict import from_config_dict
from apr_jax.tasks import TASKS
from apr_jax.tasks.countdown.rules import Problem, sample_problem
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed, SpawnCall
from apr_jax.tasks.generation import demonstrate
from apr_jax.tasks.nested_sums import NestedSumsConfig, sample
from apr_jax.tasks.text_dialect import TextDialect
from apr_jax.tasks.words import COUNTDOWN_TEXT, NESTED_SUMS_FORK, NESTED_SUMS_TEXT, SumsInWords
from configs import nested_sums
from tests.configs import LAPTOP_TASK

TEXT, FORK = TextDialect(SumsInWords()), TextDialect(SumsInWords(), children="fork", joins="texts")
PROMPT = "Compute 1+2 modulo 10.\n"
FIRST, SECOND = "<thread 1>\nadd 1\n</thread>\n", "<thread 2>\ntwo\nlines\n</thread>\n"


def test_a_spawn_names_tasks():
    text = PROMPT + "let me see\n<spawn>\n" + FIRST + SECOND + "</spawn>\n"
    start = text.index("<spawn>")
    assert TEXT.read_spawn(text) == SpawnCall(start, ("add 1\n", "two\nlines\n"), ("1", "2"), None)
    assert FORK.read_spawn(text) == SpawnCall(start, ("<thread 1>\n", "<thread 2>\n"), ("1", "2"), None)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FIRST + SECOND + "</spawn>\n", "no_spawn_begin"),
        ("x <spawn>\n" + FIRST + "</spawn>\n", "no_spawn_begin"),
        ("<spawn>\n</spawn>\n", "empty_spawn"),
        ("<spawn>\nhello\n" + FIRST + "</spawn>\n", "malformed_spawn"),
        ("<spawn>\n" + FIRST + "\n</spawn>\n", "malformed_spawn"),
        ("<spawn>\n<thread 1>\nadd 1\n</spawn>\n", "malformed_spawn"),
        ("<spawn>\n<thread 1>\nadd 1</thread>\n</spawn>\n", "malformed_spawn"),
        ("<spawn>\n<thread 01>\nadd 1\n</thread>\n</spawn>\n", "malformed_spawn"),
        ("<spawn>\n<thread \u0661>\nadd 1\n</thread>\n</spawn>\n", "malformed_spawn"),
        ("<spawn>\n" + SECOND + "</spawn>\n", "wrong_index"),
        ("<spawn>\n" + FIRST + FIRST + "</spawn>\n", "wrong_index"),
        ("<spawn>\n<thread 1>\n</thread>\n</spawn>\n", "empty_task"),
        ("<spawn>\n<thread 1>\n \n</thread>\n</spawn>\n", "empty_task"),
        ("<spawn>\n<thread 1>\n<result>\n1\n</thread>\n</spawn>\n", "nested_tag"),
        ("<spawn>\n<thread 1>\n<thread 2>\n1\n</thread>\n</spawn>\n", "nested_tag"),
        ("<spawn>\n<spawn>\n" + FIRST + "</spawn>\n", "nested_tag"),
    ],
)
def test_other_spawns_have_a_reason(body, reason):
    assert TEXT.read_spawn(PROMPT + body) == Malformed(reason)


@pytest.mark.parametrize(
    ("written", "ending"),
    [
        ("<result>\n3\n</result>\n", Ending("3", "answered", "")),
        ("so\n<result>\ntwo\nlines\n</result>\n", Ending("two\nlines", "answered", "")),
        ("<result>\n</result>\n", Ending(None, "no_solution", "no_solution")),
        ("<result>\n \n</result>\n", Ending(None, "no_solution", "no_solution")),
        ("3\n", Ending(None, "malformed", "no_result")),
        ("so <result>\n3\n</result>\n", Ending(None, "malformed", "no_result")),
        ("<result>\n3\n", Ending(None, "malformed", "malformed_result")),
        ("<result>\n</result>", Ending(None, "malformed", "malformed_result")),
        ("<result>\n3</result>\n", Ending(None, "malformed", "malformed_result")),
        ("<result>\n3\n</result>\nand\n", Ending(None, "malformed", "malformed_result")),
        ("<result>\n</thread>\n</result>\n", Ending(None, "malformed", "nested_tag")),
        ("<result>\n<thread 2>\n</result>\n", Ending(None, "malformed", "nested_tag")),
    ],
)
def test_endings(written, ending):
    assert TEXT.read_ending(PROMPT + written) == ending
    child = TEXT.read_child(PROMPT + written, "1")
    assert child == (Malformed(ending.reason) if ending.status == "malformed" else ChildResult("1", ending.answer))


def test_joins_hold_results_or_texts():
    results = [ChildResult("1", "3", "1+2=3\n<result>\n3\n</result>\n"), ChildResult("2", None)]
    assert TEXT.render_join(results, None) == "<join>\n<thread 1>\n3\n</thread>\n<thread 2>\n</thread>\n</join>\n"
    texts = "<join>\n<thread 1>\n1+2=3\n<result>\n3\n</result>\n</thread>\n<thread 2>\n</thread>\n</join>\n"
    assert FORK.render_join(results, None) == texts
    # What a child wrote may hold tags; what the parent writes after it is read alike.
    assert FORK.read_ending(PROMPT + texts + "<result>\n4\n</result>\n").answer == "4"


@pytest.mark.parametrize("question", ["no newline", "a <spawn>\n", "</thread>\n"])
def test_a_question_is_whole_lines_without_tags(question):
    class Asking(SumsInWords):
        def question(self, problem):
            return question

    with pytest.raises(ValueError, match="is not whole lines without tags"):
        TextDialect(Asking()).prompt(None)


@pytest.mark.parametrize("task", [NESTED_SUMS_TEXT, NESTED_SUMS_FORK, COUNTDOWN_TEXT], ids=lambda task: task.name)
@pytest.mark.parametrize("budget", [False, True])
def test_demonstrations_are_right_and_well_formed(task, budget):
    rng, solved, spawns = random.Random(0), 0, 0
    dialect, countdown = task.dialects["adaptive"], task is COUNTDOWN_TEXT
    section = (
        dataclasses.replace(LAPTOP_TASK, name=task.name) if countdown else NestedSumsConfig(name=task.name, depth=3)
    )
    for _ in range(60):
        problem = sample_problem(rng, section) if countdown else sample(rng, 3)
        shown = demonstrate(problem, rng, section, "adaptive", budget)
        solved += shown.correct
        for call in shown.calls:
            text = call.context + call.completion
            spawns += call.ends_in_spawn
            if call.ends_in_spawn:
                assert isinstance(dialect.read_spawn(text), SpawnCall)
            else:
                assert dialect.read_ending(text).status in ("answered", "no_solution")
        assert shown.calls[0].context.startswith("At most ") == budget
    assert solved == 60
    assert spawns > 40


def test_countdown_in_words_is_verified_by_its_operations():
    problem = Problem((2, 3, 4), 24)
    assert COUNTDOWN_TEXT.verify("2*3=6\n4*6=24", problem).correct
    assert COUNTDOWN_TEXT.express("2*3=6\n4*6=24", problem) == "4*2*3"
    assert COUNTDOWN_TEXT.vote("3*2=6\n6*4=24") == COUNTDOWN_TEXT.vote("2*3=6\n4*6=24")
    reasons = {
        "2*3=6\n4+6=10": "target_missed",
        "2*3=6": "numbers_left_over",
        "2*3=6\nhello": "malformed_operation",
        "2*3=6, Resulting Numbers: [4]\n4*6=24": "malformed_operation",
        "2*3=7\n4*6=24": "wrong_arithmetic",
    }
    assert {answer: COUNTDOWN_TEXT.verify(answer, problem).reason for answer in reasons} == reasons
    assert COUNTDOWN_TEXT.verify(None, problem).reason == "no_answer"


def test_a_configuration_names_them():
    for name in ("nested_sums_text", "nested_sums_fork"):
        config = nested_sums.get_config()
        config.task.name = name
        assert TASKS[from_config_dict(config).task.name].marks == TEXT.marks
