"""Hogwild! as a program: it rebuilds demonstrations, takes the first answer, and counts what goes wrong."""

import dataclasses

import pytest

from apr_jax.config_dict import from_config_dict
from apr_jax.engine.threads import RolloutKey
from apr_jax.evaluation.metrics import record_rollout
from apr_jax.reasoning.hogwild import hogwild
from apr_jax.reasoning.policy_engine import policy_engine
from apr_jax.tasks.countdown.hogwild import HOGWILD, LEAVE
from apr_jax.tasks.countdown.rules import Problem, verify
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.dialect import demonstrated_tokens
from configs.methods import get_config
from tests.engine.helpers import make_mesh
from tests.reasoning.fixtures import (
    DEPTH_FIRST,
    MODEL,
    SMALL,
    TOKENIZER,
    Replay,
    TextScript,
    call_tokens,
    demonstrations,
    settings,
)
from tests.reasoning.scripted_engine import ScriptedEngine

PROBLEM = Problem((2, 3), 5)
ANSWER = (
    "Exploring Operation: 2+3=5, Resulting Numbers: [5]\n5,5 equal: Goal Reached\n"
    "Moving to Node #0\nCurrent State: 5:[2, 3], Operations: []\n"
    "Exploring Operation: 2+3=5, Resulting Numbers: [5]\n5,5 equal: Goal Reached\n"
)
WRONG = "Exploring Operation: 2*3=6, Resulting Numbers: [6]\n6,5 unequal: No Solution\n"
LEFT = WRONG + LEAVE


@pytest.mark.parametrize("task", [SMALL, DEPTH_FIRST], ids=["small", "depth_first"])
def test_rebuilds_demonstrations_token_by_token(task):
    for demo in filter(lambda demo: demo.correct, demonstrations(task, "hogwild", 12)):
        (rollout,) = ScriptedEngine(Replay([demo])).run([(RolloutKey(0, 0), hogwild(demo.problem, settings()))])
        written = [(tuple(call.context.tolist()), tuple(call.tokens.tolist())) for call in rollout.calls]
        assert written == [call_tokens(call) for call in demo.calls]
        assert rollout.result.status == "answered"
        assert verify(rollout.result.answer, demo.problem).correct
        assert (rollout.result.num_spawns, rollout.result.num_children) == (1, 2)
        answered = [len(call.tokens) for call in rollout.calls if LEAVE not in decoded(call)]
        assert rollout.sequential_tokens == min(answered), "the first answer ends it"
        counted = demonstrated_tokens(COUNTDOWN.dialects["hogwild"], demo, lambda text: len(TOKENIZER.encode(text)))
        prompt = len(TOKENIZER.encode_prompt(HOGWILD.prompt(demo.problem)))
        segments = sum(len(call.context) - prompt + len(call.tokens) for call in rollout.calls)
        assert counted == (max(len(call.tokens) for call in rollout.calls), counted.total, prompt + segments)


def decoded(call):
    return TOKENIZER.decode(call.tokens.tolist())


def run(*texts, **engine):
    script = TextScript({(0, number): [text] for number, text in enumerate(texts)})
    (rollout,) = ScriptedEngine(script, **engine).run([(RolloutKey(0, 0), hogwild(PROBLEM, settings()))])
    return rollout


@pytest.mark.parametrize(
    ("texts", "status", "reason", "children"),
    [
        ((ANSWER, LEFT), "answered", "", ()),
        ((LEFT, ANSWER), "answered", "", ()),
        ((WRONG + "No solution found.\n",) * 2, "no_solution", "no_solution", ()),
        ((LEFT, LEFT), "no_solution", "left", ()),
        ((WRONG, LEFT), "malformed", "unfinished", ("unfinished",)),
        ((WRONG + "5,5 equal: Goal Reached\n", LEFT), "malformed", "no_replay", ("no_replay",)),
    ],
)
def test_outcomes(texts, status, reason, children):
    outcome = run(*texts).result
    assert (outcome.status, outcome.reason, outcome.child_reasons) == (status, reason, children)
    assert (outcome.answer is not None) == (status == "answered") == verify(outcome.answer, PROBLEM).correct


def test_the_record_tells_how_each_worker_ended():
    record = record_rollout(
        PROBLEM, run(LEFT, ANSWER), TOKENIZER, MODEL, method="hogwild", keep_calls=True, task=COUNTDOWN
    )
    assert record["correct"]
    assert record["child_solved"]
    assert [thread["result"] for thread in record["threads"] if thread["path"]] == ["left", "solved"]


def test_cut_off_workers_are_truncated():
    outcome = run(WRONG * 10, LEFT, max_steps=20).result
    assert (outcome.status, outcome.reason) == ("truncated", "max_steps")


@pytest.mark.parametrize(("method", "lanes", "workers"), [("hogwild", 32, 2), ("adaptive", 32, 2), ("adaptive", 1, 0)])
def test_any_policy_can_share_and_only_its_own_method_is_warmed_up_for_it(monkeypatch, method, lanes, workers):
    made = {}
    monkeypatch.setattr("apr_jax.reasoning.policy_engine.Engine", lambda *_, **how: made.update(how))
    config = from_config_dict(get_config(method))
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, lanes=lanes))
    policy_engine(config, make_mesh(), TOKENIZER, None)
    assert made["max_workers"] == workers
    assert made["expects_groups"] == (method == "hogwild")
    policy_engine(config, make_mesh(), TOKENIZER, None, expects_groups=True)
    assert (made["max_workers"], made["expects_groups"]) == (2, True), "whatever the policy was trained for"
