"""The answer straight, as a program."""

import pytest

from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.direct import direct
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.rules import Problem
from tests.reasoning.fixtures import REFERENCE, SMALL, Replay, TextScript, call_tokens, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine

PROBLEM = Problem((2, 3), 5)


@pytest.mark.parametrize("task", [SMALL, REFERENCE], ids=["small", "reference"])
def test_rebuilds_demonstrations_token_by_token(task):
    for demo in demonstrations(task, "direct", 10):
        (rollout,) = ScriptedEngine(Replay([demo])).run([(RolloutKey(0, 0), direct(demo.problem, settings()))])
        ((context, written),) = [(call.context.tolist(), call.tokens.tolist()) for call in rollout.calls]
        assert (tuple(context), tuple(written)) == call_tokens(demo.calls[0])
        assert (rollout.result.answer, rollout.result.status) == (demo.answer, "answered")


@pytest.mark.parametrize(
    ("text", "engine", "expected"),
    [
        (trace.final_lines(5, 6, "2*3=6"), {}, ("malformed", "unfinished")),
        (trace.final_lines(5, 5, "2+3=5"), {"max_steps": 3}, ("truncated", "max_steps")),
        (trace.final_lines(5, 5, "2+3=5"), {"max_seq_len": 12}, ("truncated", "context_full")),
    ],
)
def test_other_endings_have_their_reasons(text, engine, expected):
    (rollout,) = ScriptedEngine(TextScript({(): [text]}), **engine).run(
        [(RolloutKey(0, 0), direct(PROBLEM, settings()))]
    )
    assert (rollout.result.status, rollout.result.reason) == expected
    assert rollout.result.answer is None
