"""Rewards compose: correctness, the measured critical path, tokens and threads."""

import dataclasses

import numpy as np
import pytest

from apr_jax.config import RewardConfig
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.train.rl.reward import reward
from apr_jax.train.rl.sample import score
from tests.reasoning.test_adaptive import GOOD, PROBLEM, TOKENIZER, run
from tests.train.small import small_config

FREE = RewardConfig(sequential_token_price=0.0, token_price=0.0, thread_price=0.0, failures_pay=True)
LOST = {**GOOD, (): [GOOD[()][0], "No solution found.\n"]}


def _lengths(rollout):
    return {path: sum(len(c.tokens) for c in rollout.calls if c.path == path) for path in [(), (0, 0), (0, 1)]}


@pytest.mark.parametrize(
    ("prices", "cost"),
    [
        ({}, lambda chain, tokens, threads: 0),
        ({"sequential_token_price": 1e-3}, lambda chain, tokens, threads: 1e-3 * chain),
        ({"token_price": 1e-3}, lambda chain, tokens, threads: 1e-3 * tokens),
        ({"thread_price": 0.1}, lambda chain, tokens, threads: 0.1 * threads),
        (
            {"sequential_token_price": 1e-4, "token_price": 2e-4, "thread_price": 0.01},
            lambda chain, tokens, threads: 1e-4 * chain + 2e-4 * tokens + 0.01 * threads,
        ),
    ],
    ids=["free", "path", "tokens", "threads", "all"],
)
def test_prices_by_hand(prices, cost):
    solved, lost = run(GOOD), run(LOST)
    charged = dataclasses.replace(FREE, **prices)
    for rollout, right in ((solved, 1), (lost, 0)):
        tokens = _lengths(rollout)
        chain = tokens[()] + max(tokens[0, 0], tokens[0, 1])
        assert rollout.sequential_tokens == chain < sum(tokens.values())
        expected = right - cost(chain, sum(tokens.values()), 2)
        assert reward(rollout, bool(right), charged) == pytest.approx(expected)


def test_failing_cheaply_earns_nothing_unless_failures_pay():
    solved, lost = run(GOOD), run(LOST)
    prices = dataclasses.replace(FREE, sequential_token_price=1e-3)
    floored = dataclasses.replace(prices, failures_pay=False)
    assert reward(lost, False, prices) < 0
    assert reward(lost, False, floored) == 0
    assert reward(solved, True, floored) == pytest.approx(1 - 1e-3 * solved.sequential_tokens)
    dear = dataclasses.replace(floored, thread_price=0.6)
    assert reward(solved, True, dear) == 0  # never worse than a wrong answer


def test_the_critical_path_gives_a_signal_among_rollouts_that_all_solve():
    config = small_config(**{"grpo.group_size": 2, "grpo.reward.sequential_token_price": 1e-4}).grpo
    short, plain = run(GOOD), dataclasses.replace(config, reward=FREE)
    long = dataclasses.replace(short, sequential_tokens=short.sequential_tokens + 50)
    priced, free = (score(grpo, [short, long], [PROBLEM] * 2, TOKENIZER, COUNTDOWN) for grpo in (config, plain))
    assert all(each.correct for each in priced)
    np.testing.assert_allclose([each.advantage for each in priced], [1, -1], rtol=1e-3)
    assert not any(each.advantage for each in free)
