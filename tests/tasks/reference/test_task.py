"""The two tasks of the released code: both readings of a rollout, and problems drawn from their file."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.data.demonstrations import fingerprint
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import TaskLacksError, ThreadText
from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.rules import Problem
from configs import reference
from tests.tasks.reference.test_files import TRACES

APR, SOSP = TASKS["reference_apr"], TASKS["reference_sosp"]
SOLVED = next(record for record in TRACES if record["parent_correct"] and len(record["spawns"]) == 1)


def threads(record: dict[str, Any], change: Callable[[str], str] = lambda text: text) -> list[ThreadText]:
    """A rollout's calls as the released code's threads wrote them, each text changed."""
    (spawn,) = record["spawns"]
    found = [ThreadText(change(spawn["parent_text"]).removesuffix("\n"), 0, True, False)]
    found += [ThreadText(change(text), 1, True, True) for text in spawn["child_texts"]]
    return [*found, ThreadText(change(record["parent_final_text"]), 0, True, True)]


def _problem(record: dict[str, Any]) -> Problem:
    return Problem(tuple(record["nums"]), record["target"])


def test_their_own_traces_are_read_alike_by_both() -> None:
    read = 0
    for record in TRACES:
        if len(record["spawns"]) == 1:
            verdict = APR.read_strictly(_problem(record), threads(record))
            assert verdict.correct == record["parent_correct"], verdict
            read += 1
    assert read > 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("<Start Sub Search 0", "<Start Sub Search 7"), "spawn_wrong_index"),
        (lambda text: text.replace("at level 1>", "at level 3>"), "spawn_wrong_level"),
        (lambda text: text.replace("<Start Sub Search 1 at", "<Start Sub Search one at"), "spawn_malformed_spawn_line"),
        (lambda text: text + "Goal Reached" if text.endswith("No solution found.\n") else text, ""),
        (lambda text: text.replace("\nNo solution found.\n", "\nGoal Reached\nGoal Reached\n"), "child_unfinished"),
        (lambda text: text.replace("\nMoving to Node #0\nC", "\nMoving to Node #0\nExploring Operation: 1\nC"), ""),
    ],
)
def test_the_first_departure_is_named(change: Callable[[str], str], reason: str) -> None:
    verdict = APR.read_strictly(_problem(SOLVED), threads(SOLVED, change))
    assert not verdict.correct or not reason
    if reason:
        assert verdict.reason == reason


def test_a_thread_that_was_cut_off_has_no_ending() -> None:
    for index, thread in enumerate(threads(SOLVED)):
        calls = threads(SOLVED)
        calls[index] = dataclasses.replace(thread, ended=False)
        reason = APR.read_strictly(_problem(SOLVED), calls).reason
        if not thread.depth:
            assert reason == ("truncated" if thread.is_last else "correct")
        else:
            assert reason == ("child_truncated" if "equal: Goal Reached" in thread.text else "correct")


def test_a_rollout_without_calls_has_no_answer() -> None:
    assert APR.read_strictly(_problem(SOLVED), []).reason == "no_answer"


def test_other_tasks_have_one_reading() -> None:
    assert not TASKS["countdown"].reads_leniently
    with pytest.raises(TaskLacksError, match="read in one way"):
        TASKS["countdown"].read_strictly(_problem(SOLVED), [])


def test_an_answer_is_an_expression_where_the_strict_verifier_agrees() -> None:
    answer = SOLVED["parent_answer"]
    assert APR.express(answer, _problem(SOLVED)) == rules.express(answer, _problem(SOLVED))
    twice = (
        "Current State: 20:[16, 4], Operations: ['4*4=16']\nExploring Operation: 16+4=20, Resulting Numbers: [20]\n"
        "20,20 equal: Goal Reached"
    )
    problem = Problem((2, 3, 4), 20)
    assert SOSP.verify(twice, problem).correct
    assert SOSP.express(twice, problem) == twice


def test_what_a_child_hands_back_is_read_as_theirs() -> None:
    for text, result in zip(SOLVED["spawns"][0]["child_texts"], SOLVED["spawns"][0]["child_results"], strict=True):
        assert APR.handed_back(text) == result


def test_train_is_drawn_from_their_file_and_the_data_set_from_its_contents(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train_sosp.json"
    items = [{"nums": r["nums"], "target": r["target"], "search_path": r["serial_text"]} for r in TRACES]
    path.write_text(json.dumps(items))
    values = reference.get_config("sosp")
    values.data.tokenizer = "builtin"
    values.task.traces = str(path)
    config = from_config_dict(values)
    draw = SOSP.sampler(config, "train")
    theirs = {_problem(record) for record in TRACES}
    assert {draw(random.Random(seed)) for seed in range(40)} < theirs
    assert SOSP.sampler(config, "validation")(random.Random(0)) not in theirs
    before = fingerprint(config)
    path.write_text(json.dumps(items[1:]))
    assert fingerprint(config) != before
    path.unlink()
    with pytest.raises(ConfigError, match=r"task\.traces='.*train_sosp.json': no such file"):
        from_config_dict(values)
