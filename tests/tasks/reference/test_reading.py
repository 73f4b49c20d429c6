"""The released code's own reading of spawns, children and endings (tests/oracles), and ours."""

import gzip
import json
import pathlib
import random
from typing import Any

import pytest

from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import Malformed
from apr_jax.tasks.reference import reading
from tests.soak.readers import mutate

ORACLE = pathlib.Path(__file__).parents[2] / "oracles" / "reference_reading.jsonl.gz"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in gzip.decompress(ORACLE.read_bytes()).splitlines()]
SPAWNS = [row for row in ROWS if "prompts" in row or "error" in row]
ENDINGS = [row for row in ROWS if "answer" in row]


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(tuple(row["numbers"]), row["target"])


def test_the_oracle_is_all_there() -> None:
    assert len(ROWS) == len(SPAWNS) + len(ENDINGS) == 240
    assert len(ENDINGS) == 120


@pytest.mark.parametrize("row", SPAWNS, ids=lambda row: row["kind"])
def test_spawns_children_and_joins_are_read_as_theirs(row: dict[str, Any]) -> None:
    text = row["text"]
    assert reading.ends_in_spawn(text)
    assert reading.ends_in_spawn(text + "\n")
    spawn = reading.read_spawn(text)
    assert reading.read_spawn(text + "\n") == spawn
    if "error" in row:
        expected = next(reason for kind, reason in reading.FAULTS.items() if kind.__name__ == row["error"])
        assert spawn == Malformed(expected)
        return
    assert isinstance(spawn, reading.Spawn)
    assert list(spawn.prompts) == row["prompts"]
    results = [reading.read_result(child) for child in row["children"]]
    assert results == row["results"]
    assert text[: spawn.start] + reading.render_join(spawn.names, results) == row["joined"]


@pytest.mark.parametrize("row", ENDINGS, ids=lambda row: row["kind"])
def test_endings_are_read_and_judged_as_theirs(row: dict[str, Any]) -> None:
    assert not reading.ends_in_spawn(row["text"])
    answer = reading.read_result(row["text"])
    assert answer == row["answer"]
    assert reading.verify_path(answer, _problem(row)).correct == row["correct"]


def _serial(problem: Problem, *operations: str) -> str:
    """Return a SoS+ thread that claims the goal and sums up these operations, all but the last in its last state."""
    *before, last = operations
    state = ", ".join(f"'{operation}'" for operation in before)
    goal = f"{problem.target},{problem.target} equal: Goal Reached\n"
    return (
        f"Current State: {problem.target}:{list(problem.numbers)}, Operations: []\n{goal}"
        f"Current State: {problem.target}:[1, 2], Operations: [{state}]\n"
        f"Exploring Operation: {last}, Resulting Numbers: [{problem.target}]\n{goal}"
    )


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        (("2+3=5", "5*4=20"), "correct"),
        (("4*4=16", "16+4=20"), "correct"),  # a number used twice: their scorer lets it pass
        (("2+3=6", "5*4=20"), "wrong_arithmetic"),
        (("2+3=5", "5*5=25"), "target_missed"),
        (("2+9=11", "11+9=20"), "number_not_available"),
        (("2+3", "5*4=20"), "malformed_operation"),
        (("2+3+4=9", "9+9+2=20"), "correct"),  # eval adds any number of numbers
        (("2**3=8", "4*5=20"), "malformed_operation"),  # never evaluated
        (("__import__('os')=5", "5*4=20"), "malformed_operation"),
    ],
)
def test_a_serial_search_is_judged_by_its_summary(operations: tuple[str, ...], expected: str) -> None:
    problem = Problem((2, 3, 4), 20)
    answer = reading.read_search(_serial(problem, *operations))
    assert reading.verify_search(answer, problem).reason == expected


@pytest.mark.parametrize(
    "text", ["", "Goal Reached\n", "20,20 equal: Goal Reached\n", "20,20 equal: Goal Reached\n" * 2]
)
def test_a_serial_search_without_a_summary_has_no_answer(text: str) -> None:
    assert reading.read_search(text) is None
    assert reading.verify_search(None, Problem((2, 3), 5)).reason == "no_answer"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("Generated Node #0,0: 9:[4, 5] Operation: 2+2=4", "Current State: 9:[4, 5], Operations: ['2+2=4']"),
        ("Generated Node #0,0: 9:[4, 2+3] Operation: 2+2=4", "Current State: 9:[4, 5], Operations: ['2+2=4']"),
        ("Generated Node #0,0: 9:4, 5 Operation: 2+2=4", "Current State: 9:[4, 5], Operations: ['2+2=4']"),
        ("Generated Node #0,0: 9:[04] Operation: 2+2=4", Malformed("malformed_list")),
        ("Generated Node #0,0: 9:[print(1)] Operation: 2+2=4", Malformed("malformed_list")),
        ("Generated Node #0,0: 9:[x] Operation: 2+2=4", Malformed("malformed_list")),
        ("Generated Node #0,0: 9:" + "[" * 5_000 + " Operation: 2+2=4", Malformed("malformed_list")),
        ("Generated Node #0,0: 9:[1/0] Operation: 2+2=4", Malformed("malformed_number")),
        ("Generated Node #0,0: x:[4, 5] Operation: 2+2=4", Malformed("malformed_number")),
        ("Generated Node #0,0: 9:5 Operation: 2+2=4", Malformed("malformed_list")),
        ("Generated Node #0,0: 9:[4, 5]", Malformed("cut_off_node")),
        ("Generated Node", Malformed("cut_off_node")),
        ("Generated Node #0,1: 9:[4, 5] Operation: 2+2=4", Malformed("unknown_node")),
        ("Generated Node #7,0: 9:[4, 5] Operation: 2+2=4", Malformed("unknown_node")),
    ],
)
def test_nodes_are_read_as_eval_would_but_never_evaluated(state: str, expected: str | Malformed) -> None:
    text = (
        f"Sub Call Budget: 10 Moving to Node #0\nCurrent State: 9:[2, 2, 5], Operations: []\n{state}\n"
        "<Calling Sub Searches>\n<Start Sub Search 7 at level 4> Moving to Node #0,0\n<End Calling Sub Searches>"
    )
    spawn = reading.read_spawn(text)
    if isinstance(expected, Malformed):
        assert spawn == expected
    else:
        assert isinstance(spawn, reading.Spawn)
        assert spawn.prompts == (f"Moving to Node #0,0\n{expected}",)


@pytest.mark.parametrize("seed", range(4))
def test_no_reader_raises_whatever_the_text(seed: int) -> None:
    rng = random.Random(seed)
    texts = [row["text"] for row in ROWS]
    spawns = 0
    for _ in range(300):
        text = mutate(rng.choice(texts), rng.choice(texts), rng)
        spawn = reading.read_spawn(f"{text}\n{reading.SPAWN_END}")
        if isinstance(spawn, reading.Spawn):
            spawns += 1
            assert len(spawn.names) == len(spawn.prompts)
        for answer in (reading.read_result(text), reading.read_search(text), text):
            for judge in (reading.verify_path, reading.verify_search):
                verdict = judge(answer, _problem(rng.choice(ROWS)))
                assert verdict.correct == (verdict.reason == "correct")
    assert spawns > 10
