"""Objectives where numbers end: no token, however far its log-probabilities lie apart, spoils a step."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.train.rl.advantage import centred, normalised
from apr_jax.train.rl.objective import OBJECTIVES, choose_objective
from apr_jax.train.rl.reward import cost, reward
from tests.train.rl.test_objective import GRPO, loss_of, tokens_of

LOG_RATIOS = [
    -1e4,
    -1e3,
    -90.0,
    -50.0,
    -21.0,
    -20.0,
    -1.0,
    -0.1,
    0.0,
    0.1,
    1.0,
    19.0,
    20.0,
    21.0,
    50.0,
    88.0,
    90.0,
    1e4,
]
ADVANTAGES = [0.0, 1.0, -1.0, 1e-6, -1e-6, 1e6, -1e6]
PPO = ("grpo", "dr_grpo", "dapo")


def _grpo(name, **fields):
    clips = {"clip_ratio": 0.2, "clip_ratio_high": 0.28, "kl_coef": 1e-3, "importance_cap": 2.0}
    return dataclasses.replace(GRPO, objective=name, **clips | fields)


def with_odd_tokens(grpo, new, old, reference, advantage, rollout=-1.0, dtype=jnp.float32):
    """Loss, terms and gradient `[cases, 5]` of rows whose second token is odd and whose others are not."""
    new, old, reference, advantage, rollout = np.broadcast_arrays(
        *map(np.asarray, (new, old, reference, advantage, rollout))
    )

    def rows(odd, others):
        return np.where(np.arange(5) == 1, odd[:, None], others)

    ones = np.ones((len(new), 5))
    call = np.broadcast_to([1, 1, 1, 1, 2], ones.shape)
    tokens = tokens_of(rows(advantage, 0.5), 0.2 * ones, 1e-3 * ones, rows(rollout, -1.0), call)
    arrays = [jnp.asarray(rows(odd, -1.0), dtype).astype(jnp.float32) for odd in (new, old, reference)]
    (_, terms), grad = loss_of(grpo, tokens, *arrays)
    return terms, np.asarray(grad)


CASES = np.asarray(list(itertools.product(LOG_RATIOS, ADVANTAGES))).T
FAR_FROM = {
    "old and reference": lambda ratio: (ratio - 1, -1, -1, -1),
    "old": lambda ratio: (-1, -1 - ratio, -1, -1),
    "reference": lambda ratio: (-1, -1, -1 + ratio, -1),
    "engine": lambda ratio: (-1, -1, -1, -1 - ratio),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_finite_at_any_log_ratio(name, dtype):
    ratios, advantages = CASES
    for where, places in FAR_FROM.items():
        new, old, reference, rollout = places(ratios)
        terms, grad = with_odd_tokens(_grpo(name), new, old, reference, advantages, rollout, dtype)
        assert np.isfinite(grad).all(), (where, CASES[:, ~np.isfinite(grad).all(axis=1)])
        assert np.isfinite([terms.policy_loss, terms.kl_loss, terms.k3]).all(), where
        assert np.isfinite(np.sum(np.square(grad, dtype=np.float32))), where  # as the guard computes it


@pytest.mark.parametrize("name", PPO)
def test_gradients_are_ppos_wherever_neither_the_clip_nor_the_bound_has_passed(name):
    ratios, advantages = CASES[:, CASES[0] != 20]
    _, grad = with_odd_tokens(_grpo(name, kl_coef=0.0, importance_cap=0.0), ratios - 1, -1, ratios - 1, advantages)
    clipped = ((advantages > 0) & (ratios > np.log(1.28))) | ((advantages < 0) & (ratios < np.log(0.8)))
    expected = np.where(clipped | (ratios > 20), 0.0, -0.2 * np.exp(np.minimum(ratios, 20)) * advantages)
    np.testing.assert_allclose(grad[:, 1], expected, rtol=1e-4, atol=1e-30)


def test_k3_is_exact_up_to_its_bound_and_then_its_tangent():
    distances = np.asarray([ratio for ratio in LOG_RATIOS if ratio != 20])
    _, grad = with_odd_tokens(_grpo("grpo", importance_cap=0.0), -1, -1, distances - 1, 0.0)
    np.testing.assert_allclose(grad[:, 1], -1e-3 * np.expm1(np.minimum(distances, 20)), rtol=2e-4, atol=1e-9)
    for distance in LOG_RATIOS:
        terms, _ = with_odd_tokens(_grpo("grpo", importance_cap=0.0), -1, -1, np.asarray([distance - 1]), 0.0)
        inside = min(distance, 20.0)
        expected = np.exp(inside) * (1 + distance - inside) - distance - 1
        np.testing.assert_allclose(float(terms.k3), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3, 0.3, 0.3],
        [1 - 1e-4 * 3, 1 - 3e-4, 1 - 3e-4, 1 - 3e-4],
        [sum([0.1] * 1000), 100.0, 100.0, sum([0.2] * 500)],
        [1e15 + 1, 1e15, 1e15, 1e15],
        [-1e-17, 0.0, 1e-17, 0.0],
        [1e15, 1e15, 1e15, 1e15],
        [0.0, 0.0, 0.0, 0.0],
    ],
)
@pytest.mark.parametrize("advantages", [normalised, centred])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-4])
def test_rewards_that_differ_by_rounding_alone_give_no_advantage(rewards, advantages, eps):
    assert not advantages(dataclasses.replace(GRPO, group_size=4, advantage_eps=eps), rewards).any()


@pytest.mark.parametrize("difference", [1e-9, 1e-6, 1e-3, 1.0])
def test_a_small_true_difference_has_a_signal(difference):
    advantages = normalised(dataclasses.replace(GRPO, group_size=4, advantage_eps=0.0), [0.5] * 3 + [0.5 - difference])
    np.testing.assert_allclose(advantages, np.sqrt([1 / 3] * 3 + [3]) * [1, 1, 1, -1], rtol=1e-4)


def test_rollouts_of_one_cost_have_one_reward_however_it_adds_up():
    """Two sequential tokens at half the price of any token are worth one of these."""

    class Made:
        def __init__(self, sequential, total):
            self.sequential_tokens, self.calls = sequential, [Call(total)]

    class Call:
        path = ()

        def __init__(self, total):
            self.tokens = np.zeros(total, np.int32)

    prices = dataclasses.replace(GRPO.reward, sequential_token_price=1e-4, token_price=2e-4)
    grpo = dataclasses.replace(GRPO, group_size=2, advantage_eps=0.0)
    unequal = 0
    for sequential, total in itertools.product(range(1, 60), range(2, 60)):
        pair = Made(sequential, total), Made(sequential + 2, total - 1)
        rewards = [reward(each, True, prices) for each in pair]
        unequal += rewards[0] != rewards[1]
        assert cost(pair[0], prices) == pytest.approx(cost(pair[1], prices))
        assert not choose_objective(grpo).advantages(grpo, rewards).any()
    assert unequal > 10
