"""A replay asks the engine for exactly the calls of the solver's search."""

import dataclasses

import numpy as np
import pytest

from apr_jax.bench.replay import benchmark_replays, make_replays, read_calls, replay, show
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.engine.threads import RolloutKey
from configs.benchmark_decode import get_config
from tests.engine.helpers import MODEL, make_engine
from tests.reasoning.fixtures import SMALL, TOKENIZER, call_tokens, demonstrations

pytestmark = pytest.mark.heavy

CONTEXT = 512


@pytest.fixture(scope="module")
def engine():
    model = dataclasses.replace(MODEL, vocab_size=336, max_seq_len=CONTEXT)
    return make_engine(model=model, lanes=8, pages=8 * 64, max_steps=CONTEXT)


def test_calls_have_the_demonstrations_lengths(engine):
    demonstration = next(d for d in demonstrations(SMALL, "adaptive", 20) if len(d.calls) > 5)
    calls = read_calls(demonstration, TOKENIZER)
    assert len(calls) == sum(call.depth == 0 for call in demonstration.calls) > 1
    assert sum(len(call.children) for call in calls) == sum(call.depth == 1 for call in demonstration.calls) > 0
    rollout = engine.run([(RolloutKey(0, 0), replay(calls))], seed=0, temperature=1.0)[0]
    expected = sorted((len(context), len(tokens)) for context, tokens in map(call_tokens, demonstration.calls))
    assert sorted((len(call.context), len(call.tokens)) for call in rollout.calls) == expected
    joined = [call for call in rollout.calls if call.path == ()][1]
    context = call_tokens([call for call in demonstration.calls if call.depth == 0][1])[0]
    assert tuple(joined.context[-20:]) == context[-20:], "the join is the solver's own"


def test_figures_are_those_of_the_run(engine):
    config = from_config_dict(get_config("smoke"))
    replays = make_replays(config, TOKENIZER, 6)
    engine.warm_up()
    figures = benchmark_replays(engine, replays, 0, None)
    calls = [call for parent in replays for call in parent]
    calls += [child for call in calls for child in call.children]
    assert figures["generated_tokens"] == sum(len(call.tokens) for call in calls)
    assert figures["children_per_problem"] == sum(len(call.children) for call in calls) / 6
    assert figures["compilations"] == 0
    for name in ("lane_occupancy", "host_share", "cache_waste"):
        assert 0 < figures[name] < 1
    assert 0 < figures["ttft_ms"]["median"] <= figures["ttft_ms"]["p99"] < figures["e2e_ms"]["p99"]
    assert np.isclose(figures["output_tokens_per_second"], figures["generated_tokens"] / figures["seconds"])
    assert "6 problems" in show(figures)


def test_too_few_problems_are_told():
    config = from_config_dict(get_config("smoke"))
    assert 0 < len(make_replays(config, TOKENIZER, None)) <= config.data.num_test
    with pytest.raises(ConfigError, match=r"99 problems asked for, and data\.num_test=16"):
        make_replays(config, TOKENIZER, 99)
