import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE, render_spawn
from apr_jax.tasks.countdown.rules import Problem, sample_problem, verify
from apr_jax.tasks.countdown.serial import SERIAL
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, ChildResult, Malformed, SpawnCall
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import LAPTOP, REFERENCE

PROBLEM = Problem((7, 3, 15), 26)
CALLS, WINDOW = "Sub Call Budget: 2 ", "Token Budget: 96 "
SEARCHED = (
    "Moving to Node #0\nCurrent State: 26:[7, 3, 15], Operations: []\n"
    "Exploring Operation: 7+3=10, Resulting Numbers: [15, 10]\nGenerated Node #0,0: 26:[15, 10] Operation: 7+3=10\n"
    "Exploring Operation: 7-3=4, Resulting Numbers: [15, 4]\nGenerated Node #0,1: 26:[15, 4] Operation: 7-3=4\n"
    "Exploring Operation: 15-3=12, Resulting Numbers: [7, 12]\nGenerated Node #0,2: 26:[7, 12] Operation: 15-3=12\n"
)
FIRST = "<Start Sub Search 0 at level 1> Moving to Node #0,1\n"
SECOND = "<Start Sub Search 1 at level 1> Moving to Node #0,0\n"
CHILD = "Moving to Node #0,1\nCurrent State: 26:[15, 4], Operations: ['7-3=4']\n"
PATH = CHILD + "Exploring Operation: 15+4=26, Resulting Numbers: [26]\n26,26 equal: Goal Reached"
SOLVED = f"{CHILD}Exploring Operation: 15+4=26, Resulting Numbers: [26]\n26,26 equal: Goal Reached\n{PATH}\n"


def test_prompts_name_their_budget_where_there_is_one() -> None:
    assert ADAPTIVE.prompt(PROBLEM) == "Moving to Node #0\nCurrent State: 26:[7, 3, 15], Operations: []\n"
    assert ADAPTIVE.prompt(PROBLEM, 8) == "Sub Call Budget: 8 " + ADAPTIVE.prompt(PROBLEM)
    assert ADAPTIVE.prompt(PROBLEM, 8, 96) == "Sub Call Budget: 8 Token Budget: 96 " + ADAPTIVE.prompt(PROBLEM)
    assert ADAPTIVE.child_prompt(CHILD, 96) == "Token Budget: 96 " + CHILD
    assert ADAPTIVE.child_prompt(CHILD, None) == CHILD
    assert trace.thread_node(ADAPTIVE.child_prompt(CHILD, 96)) == trace.thread_node(CHILD) == "0,1"
    assert trace.thread_node(SERIAL.prompt(PROBLEM)) == "0"
    assert trace.thread_node("hello\n") is None
    assert SERIAL.prompt(PROBLEM) == "Current State: 26:[7, 3, 15], Operations: []\n"
    assert SERIAL.prompt(PROBLEM, 512) == "Token Budget: 512 " + SERIAL.prompt(PROBLEM)


@pytest.mark.parametrize("prefix", ["", CALLS, WINDOW, CALLS + WINDOW])
def test_a_spawn_gives_each_child_its_prompt(prefix: str) -> None:
    text = prefix + SEARCHED + CALL_BEGIN + FIRST + SECOND + CALL_END
    assert ADAPTIVE.read_spawn(text) == SpawnCall(
        start=len(prefix + SEARCHED),
        contexts=(CHILD, "Moving to Node #0,0\nCurrent State: 26:[15, 10], Operations: ['7+3=10']\n"),
        names=("0,1", "0,0"),
        level=1,
    )


def test_a_child_may_spawn_too() -> None:
    """Its children's operations are those of its own prompt, those on the way, and the node's own."""
    text = (
        "Moving to Node #0,4\nCurrent State: 9:[2, 3, 4, 5], Operations: ['1+1=2']\n"
        "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5, 5]\n"
        "Generated Node #0,4,1: 9:[4, 5, 5] Operation: 2+3=5\n"
        "Moving to Node #0,4,1\nCurrent State: 9:[4, 5, 5], Operations: ['1+1=2', '2+3=5']\n"
        "Exploring Operation: 5-5=0, Resulting Numbers: [4, 0]\nGenerated Node #0,4,1,0: 9:[4, 0] Operation: 5-5=0\n"
        f"{CALL_BEGIN}<Start Sub Search 0 at level 2> Moving to Node #0,4,1,0\n{CALL_END}"
    )
    call = ADAPTIVE.read_spawn(text)
    assert isinstance(call, SpawnCall)
    assert call.level == 2
    expected = "Moving to Node #0,4,1,0\nCurrent State: 9:[4, 0], Operations: ['1+1=2', '2+3=5', '5-5=0']\n"
    assert call.contexts == (expected,)
    assert text[call.start :] == render_spawn(call.names, level=2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_call_end"),
        (SEARCHED, "no_call_end"),
        (SEARCHED + CALL_BEGIN + FIRST + CALL_END + "\n", "no_call_end"),
        (SEARCHED + FIRST + CALL_END, "no_call_begin"),
        (SEARCHED + " " + CALL_BEGIN + FIRST + CALL_END, "no_call_begin"),
        (CALL_BEGIN + FIRST + CALL_END, "no_call_begin"),
        ("hello\n" + SEARCHED + CALL_BEGIN + FIRST + CALL_END, "unknown_prompt"),
        (SEARCHED.replace("#0\n", "#00\n") + CALL_BEGIN + FIRST + CALL_END, "unknown_prompt"),
        (SEARCHED + CALL_BEGIN + CALL_END, "empty_spawn"),
        (SEARCHED + CALL_BEGIN + "\n" + CALL_END, "malformed_spawn_line"),
        (SEARCHED + CALL_BEGIN + FIRST + CALL_BEGIN + CALL_END, "malformed_spawn_line"),
        (SEARCHED + CALL_BEGIN + FIRST[:-1] + CALL_END, "malformed_spawn_line"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("#0,1", "#0,"), "no_call_end"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("#0,1", "#0,") + CALL_END, "malformed_spawn_line"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("Search 0", "Search \u0660") + CALL_END, "malformed_spawn_line"),
        (SEARCHED + CALL_BEGIN + SECOND + CALL_END, "wrong_index"),
        (SEARCHED + CALL_BEGIN + FIRST + FIRST.replace("#0,1", "#0,0") + CALL_END, "wrong_index"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("level 1", "level 0") + CALL_END, "wrong_level"),
        (SEARCHED + CALL_BEGIN + FIRST + SECOND.replace("level 1", "level 2") + CALL_END, "wrong_level"),
        (SEARCHED + CALL_BEGIN + FIRST + SECOND.replace("#0,0", "#0,1") + CALL_END, "duplicate_node"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("#0,1", "#0,9") + CALL_END, "unknown_node"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("#0,1", "#0") + CALL_END, "unknown_node"),
        (SEARCHED + CALL_BEGIN + FIRST.replace("#0,1", "#1,1") + CALL_END, "unknown_node"),
        (SEARCHED.replace("Node #0,1: 26", "Node #0,1: 27") + CALL_BEGIN + FIRST + CALL_END, "wrong_target"),
        (SEARCHED.replace("Node #0,0", "Node #0,1") + CALL_BEGIN + FIRST + CALL_END, "ambiguous_node"),
        (SEARCHED.replace("26:[15, 4]", "26:[15]") + CALL_BEGIN + FIRST + CALL_END, "final_node"),
    ],
)
def test_malformed_spawns_have_reasons(text: str, reason: str) -> None:
    assert ADAPTIVE.read_spawn(text) == Malformed(reason)


def test_a_join_lists_its_children_in_order() -> None:
    joined = ADAPTIVE.render_join([ChildResult("0,1", PATH), ChildResult("0,0", None)])
    assert joined == (
        "<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1 at Node #0,1>\n"
        f"{PATH}\n<No Solution in Sub Search 1 at level 1 at Node #0,0>\n<End Sub Searches>\n"
    )
    assert "at level 2 at" in ADAPTIVE.render_join([ChildResult("0,1,0", None)], level=2)


def test_a_childs_result_is_its_path_or_that_there_is_none() -> None:
    assert trace.read_child(SOLVED, "0,1") == ChildResult("0,1", PATH)
    assert trace.read_child(CHILD + trace.NO_SOLUTION, "0,1") == ChildResult("0,1", None)


@pytest.mark.parametrize(
    ("text", "node_id", "reason"),
    [
        (CHILD, "0,1", "unfinished"),
        (SOLVED.replace("26,26 equal", "26,27 equal"), "0,1", "unfinished"),
        (SOLVED + "more\n", "0,1", "unfinished"),
        (PATH + "\n", "0,1", "no_replay"),
        (SOLVED, "0,2", "wrong_root"),
        (SOLVED.replace("Reached\nMoving", "Reached\n<Calling Sub Searches>\nMoving"), "0,1", "malformed_path"),
        (SOLVED.replace("Reached\nMoving to Node #0,1\n", "Reached\n"), "0,1", "malformed_path"),
        (SOLVED + "26,26 equal: Goal Reached\n", "0,1", "malformed_path"),
    ],
)
def test_malformed_children_have_reasons(text: str, node_id: str, reason: str) -> None:
    assert trace.read_child(text, node_id) == Malformed(reason)


def test_an_answer_is_a_replay_at_the_end_of_the_text() -> None:
    assert trace.read_answer(SOLVED) == PATH
    assert trace.read_answer(SOLVED + "Exit Sub Search at level 1\n") == PATH + "\nExit Sub Search at level 1"
    assert trace.read_answer(PATH) is None
    assert trace.read_answer(SOLVED + trace.NO_SOLUTION) is None
    assert trace.read_answer("") is None


@settings(deadline=None)
@given(st.text() | st.text(alphabet="<>\n,:[]#0123456789+-*/='MovingSubSearchGoalReached "))
def test_any_text_can_be_read(text: str) -> None:
    _read_all(text)
    _read_all(text + "\n" + CALL_BEGIN + text + CALL_END)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.data())
def test_damaged_traces_can_be_read(seed: int, small: bool, data: st.DataObject) -> None:
    """Characters and lines of a real trace are dropped, doubled and moved; every reader still answers."""
    rng = random.Random(seed)
    task = LAPTOP if small else REFERENCE
    problem = sample_problem(rng, task)
    demonstration = demonstrate(problem, rng, task, "adaptive", condition_on_budget=True)
    call = data.draw(st.sampled_from(demonstration.calls))
    text = call.context + call.completion
    for _ in range(data.draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True)
        units = data.draw(st.sampled_from([lines, list(text)]))
        begin = data.draw(st.integers(0, len(units)))
        end = data.draw(st.integers(begin, min(len(units), begin + 8)))
        into = data.draw(st.integers(0, len(units)))
        piece = units[begin:end]
        kept = data.draw(st.sampled_from([units, [*units[:begin], *units[end:]]]))
        text = "".join([*kept[:into], *data.draw(st.sampled_from([[], piece])), *kept[into:]]) or "\n"
    _read_all(text)
    _read_all(text + CALL_END)
    answer = trace.read_answer(text)
    assert verify(answer, problem).reason


def _read_all(text: str) -> None:
    call = ADAPTIVE.read_spawn(text)
    assert isinstance(call, SpawnCall | Malformed)
    if isinstance(call, SpawnCall):
        assert len(set(call.names)) == len(call.contexts) > 0
        assert all(context.endswith("\n") for context in call.contexts)
        assert text[call.start :] == render_spawn(call.names, call.level)
    result = trace.read_child(text, "0,1")
    assert isinstance(result, ChildResult | Malformed)
    answer = trace.read_answer(text)
    assert answer is None or answer == answer.strip()
