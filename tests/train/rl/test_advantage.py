"""Advantages by hand."""

import dataclasses

import numpy as np
import pytest

from apr_jax.train.rl.advantage import centred, normalised
from tests.train.small import small_config


def _grpo(group_size, eps):
    return dataclasses.replace(small_config().grpo, group_size=group_size, advantage_eps=eps)


def test_a_group_is_compared_with_its_own_mean():
    rewards = [1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    advantages = normalised(_grpo(4, 1e-4), rewards)
    std = np.sqrt(3) / 4
    np.testing.assert_allclose(advantages[:4], [0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3)
    assert not advantages[4:].any()  # no signal: exactly zero, whatever eps
    np.testing.assert_allclose(centred(_grpo(4, 1e-4), rewards)[:4], [0.75] + [-0.25] * 3)


@pytest.mark.parametrize("advantages", [normalised, centred])
def test_equal_rewards_have_no_advantage_and_groups_are_whole(advantages):
    assert not advantages(_grpo(3, 0.0), [0.1] * 3).any()
    with pytest.raises(ValueError, match="3 rewards do not divide into groups of 2"):
        advantages(_grpo(2, 1e-4), [0, 1, 0])
