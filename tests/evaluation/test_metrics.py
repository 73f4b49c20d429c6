"""Metrics against figures that were worked out by hand or by an independent formula."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from apr_jax.engine.threads import Call, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.evaluation.metrics import (
    pass_at_k,
    record_rollout,
    summarize,
    wilson_interval,
)
from apr_jax.evaluation.report.viewer import bar_class
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.base import Outcome
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.tree_of_thoughts import tree_of_thoughts
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from tests.reasoning.fixtures import MODEL, TOKENIZER, TextScript, settings
from tests.reasoning.scripted_engine import ScriptedEngine
from tests.reasoning.test_adaptive import EXPLORED, GOOD, LAST, LOSES, PARENT_WINS, PROBLEM, SPAWN, STATE_6_4


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (587, 1000, 0.5562, 0.6171)],
)
def test_wilson_interval(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_are_where_the_score_test_rejects():
    for successes, total in ((3, 17), (120, 300)):
        for bound in wilson_interval(successes, total):
            z = abs(successes / total - bound) / math.sqrt(bound * (1 - bound) / total)
            assert z == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes, total):
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(successes, total)


def run(texts, problem=PROBLEM):
    engine = ScriptedEngine(TextScript(texts))
    (rollout,) = engine.run([(RolloutKey(0, 0), adaptive(problem, settings()))])
    return record_rollout(problem, rollout, TOKENIZER, MODEL, method="adaptive", keep_calls=True, task=COUNTDOWN)


def test_threads_of_tree_of_thoughts_end_in_verdicts_and_dropped_lines_are_counted():
    step = "Exploring Operation: 4*6=24, Resulting Numbers: [24]\n"
    texts = {(0, 0): [step + "24\n"], (1, 0): ["sure\n"]}
    (rollout,) = ScriptedEngine(TextScript(texts)).run(
        [(RolloutKey(0, 0), tree_of_thoughts(Problem((4, 6), 24), settings()))]
    )
    record = record_rollout(
        Problem((4, 6), 24), rollout, TOKENIZER, MODEL, method="tree_of_thoughts", keep_calls=True, task=COUNTDOWN
    )
    assert record["correct"]
    assert [thread["result"] for thread in record["threads"]] == ["proposed", "sure"]
    assert {bar_class(thread["result"], tuple(thread["path"])) for thread in record["threads"]} == {""}
    assert summarize([record, record], seconds=1.0)["dropped_lines"] == {"malformed_line": 2}


def test_record_of_a_solved_rollout():
    record = run(GOOD)
    lengths = {path: [len(TOKENIZER.encode(text)) for text in texts] for path, texts in GOOD.items()}
    parent, child_0, child_1 = sum(lengths[()]) + 1, lengths[(0, 0)][0] + 1, lengths[(0, 1)][0] + 1
    assert record["correct"]
    assert record["verdict"] == "correct"
    assert record["child_solved"]
    assert record["total_tokens"] == parent + child_0 + child_1
    assert record["sequential_tokens"] == parent + max(child_0, child_1)
    assert (record["num_calls"], record["num_spawns"], record["num_children"]) == (4, 1, 2)
    assert (record["operations"], record["operations_right"]) == (7, 7)
    assert [thread["result"] for thread in record["threads"]] == ["correct", "no_solution", "solved"]
    assert record["calls"][0]["text"] == SPAWN
    assert record["calls"][2]["context"] + record["calls"][2]["text"] == (
        "Moving to Node #0,0\nCurrent State: 24:[4, 5], Operations: ['3+2=5']\n" + LOSES
    )
    assert [call["stop"] for call in record["calls"]] == ["token"] * 4


@pytest.mark.parametrize(
    ("child", "result"),
    [
        (LAST + STATE_6_4.replace("2*3", "2+3") + LAST, "wrong_path"),
        ("Exploring Operation: 4*6=24, Resulting Numbers: [24]\n", "unfinished"),
        (EXPLORED + "<Calling Sub Searches>\n<End Calling Sub Searches>\n", "malformed"),
    ],
)
def test_how_a_child_ended_is_told(child, result):
    record = run({(): [SPAWN, "No solution found.\n"], (0, 0): [LOSES], (0, 1): [child]})
    assert record["threads"][2] == {"path": [0, 1], "result": result}
    assert not record["child_solved"]
    assert record["verdict"] == "no_solution"


def test_wrong_answers_are_counted_by_the_verifiers_reason():
    wrong = run({**GOOD, (): [SPAWN, GOOD[()][1].replace("4*6=24", "4*6=25")]})
    assert (wrong["status"], wrong["correct"], wrong["verdict"]) == ("answered", False, "wrong_arithmetic")
    assert wrong["child_solved"]
    summary = summarize([wrong, run(GOOD)], seconds=2.0)
    assert summary["failures"] == {"wrong_arithmetic": 1}
    assert summary["child_solved_but_wrong_rate"] == 0.5


def fake_record(index, outcome, tokens, sequential, latency):
    calls = tuple(
        Call(
            (),
            np.zeros(3, np.int32),
            np.zeros(n, np.int32),
            np.zeros(n, np.float32),
            Stop(StopReason.TOKEN, 0),
            0,
            0,
            1,
        )
        for n in tokens
    )
    rollout = Rollout(
        RolloutKey(index, 0), outcome, calls, sequential, latency, Work(prefilled=7, decoded=2, attended=5)
    )
    return record_rollout(PROBLEM, rollout, TOKENIZER, MODEL, method="adaptive", keep_calls=False, task=COUNTDOWN)


def test_summary_by_hand():
    right = Outcome(answer=GOOD[()][1].strip(), status="answered", reason="", num_spawns=1, num_children=4)
    lost = Outcome(answer=None, status="no_solution", reason="no_solution", num_spawns=2, num_children=5)
    broken = Outcome(
        answer=None,
        status="malformed",
        reason="unknown_node",
        num_spawns=1,
        num_children=1,
        child_reasons=("max_steps",),
    )
    cut = Outcome(answer=None, status="truncated", reason="max_steps")
    records = [
        fake_record(0, right, [100, 20, 30], 120, 40.0),
        fake_record(1, lost, [50, 50], 100, 60.0),
        fake_record(2, broken, [10], 10, 20.0),
        fake_record(3, cut, [40], 40, 80.0),
    ]
    assert "calls" not in records[0]
    summary = summarize(records, seconds=10.0)
    assert summary["accuracy"] == 0.25
    assert (summary["accuracy_low"], summary["accuracy_high"]) == wilson_interval(1, 4)
    assert summary["num_problems"] == 4
    assert summary["total_tokens"] == summary["generated_tokens"] == 300 / 4
    assert summary["prefilled_tokens"] == 7
    assert summary["peak_context"] == (103 + 53 + 13 + 43) / 4
    assert summary["peak_context_max"] == 103
    assert summary["threads_per_rollout"] == 1
    assert summary["flops"] == Work(prefilled=7, decoded=2, attended=5).flops(MODEL)
    assert summary["sequential_tokens"] == 270 / 4
    assert summary["tokens_per_call"] == 300 / 7
    assert summary["children_per_rollout"] == 10 / 4
    assert summary["children_per_spawn"] == 10 / 4
    assert summary["spawn_depth"] == 0
    assert summary["malformed_rate"] == 0.25
    assert summary["malformed_reasons"] == {"unknown_node": 1}
    assert summary["truncated_rate"] == 0.25
    assert summary["truncated_reasons"] == {"max_steps": 1}
    assert summary["failures"] == {"max_steps": 1, "no_solution": 1, "unknown_node": 1}
    assert summary["child_reasons"] == {"max_steps": 1}
    assert summary["child_failure_rate"] == 0.1
    assert summary["latency_ms"] == 50.0
    assert summary["tokens_per_second"] == 30.0


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (6, 0), (6, 1), (6, 3), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_one_that_is_right(n, c):
    for k in range(1, n + 1):
        choices = list(itertools.combinations([index < c for index in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_of_no_samples_is_refused(n, c, k):
    with pytest.raises(ValueError, match="no pass@"):
        pass_at_k(n, c, k)


def test_one_run_of_samples_gives_the_figures_of_fewer():
    """Wrong, right, nothing, right: two votes against one, and the likeliest is the wrong one."""
    right = PARENT_WINS.removeprefix(ADAPTIVE.prompt(PROBLEM))
    texts = [right.replace("2*3=6", "2+3=6"), right, "No solution found.\n", right]
    script = TextScript({(0, index): [text] for index, text in enumerate(texts)})
    engine = ScriptedEngine(script, logprob=lambda path: -0.1 if path == (0, 0) else -0.2)
    program = make_program("cons@4:direct", PROBLEM, settings())
    (rollout,) = engine.run([(RolloutKey(0, 0), program)])
    record = record_rollout(
        PROBLEM, rollout, TOKENIZER, MODEL, method="cons@4:direct", keep_calls=False, task=COUNTDOWN
    )
    lengths = [len(TOKENIZER.encode(text)) + 1 for text in texts]
    assert [sample["correct"] for sample in record["samples"]] == [False, True, False, True]
    assert [sample["tokens"] for sample in record["samples"]] == lengths
    assert record["correct"]
    assert record["pass_at_k"] == pytest.approx([2 / 4, 1 - 1 / 6, 1, 1])
    assert record["cons_at_k"] == [0, 0, 0, 1], "of two answers with one vote each the first counts"
    assert record["best_at_k"] == [0, 0, 0, 0]
    assert record["tokens_at_k"] == [sum(lengths[:k]) for k in (1, 2, 3, 4)]
    json.dumps(record, allow_nan=False)
    summary = summarize([record, {**record, "cons_at_k": [1, 1, 1, 1]}], seconds=1.0)
    assert summary["cons_at_k"] == [0.5, 0.5, 0.5, 1]
    assert summary["tokens_at_k"] == record["tokens_at_k"]
    assert "cons_at_k" not in summarize([record, {**record, "samples": []}], seconds=1.0)
    silent = tuple(dataclasses.replace(sample, mean_logprob=None) for sample in rollout.result.samples)
    rollout = dataclasses.replace(rollout, result=dataclasses.replace(rollout.result, samples=silent))
    record = record_rollout(
        PROBLEM, rollout, TOKENIZER, MODEL, method="cons@4:hogwild", keep_calls=False, task=COUNTDOWN
    )
    assert "best_at_k" not in {**record, **summarize([record], seconds=1.0)}


def test_summary_of_threads_that_never_spawn_and_of_nothing():
    lost = Outcome(answer=None, status="no_solution", reason="no_solution")
    summary = summarize([fake_record(0, lost, [], 0, 1.0)], seconds=0.0)
    assert summary["children_per_spawn"] == summary["tokens_per_call"] == summary["tokens_per_second"] == 0.0
    with pytest.raises(ValueError, match="no records"):
        summarize([], seconds=1.0)
