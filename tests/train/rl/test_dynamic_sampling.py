"""Groups without signal are replaced, up to a cap, and counted."""

import numpy as np
import pytest

from apr_jax.engine.threads import Rollout, RolloutKey
from apr_jax.engine.work_counters import Work
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.train.rl.dynamic_sampling import draw
from apr_jax.train.rl.rollouts import Scored, choose_problems

GROUP = 2


def _roll(has_signal, asked_for):
    """Groups of two whose first rollout alone solves the problem, where there is to be a signal."""

    def roll(chosen):
        asked_for.append(list(chosen))
        rollouts = tuple(Rollout(RolloutKey(i, s), None, (), 0, 0.0, Work()) for i in chosen for s in range(GROUP))
        correct = tuple(r.key.sample == 0 and has_signal(r.key.problem) for r in rollouts)
        rewards = tuple(map(float, correct))
        advantages = np.repeat([float(has_signal(i)) for i in chosen], GROUP) * np.tile([1.0, -1.0], len(chosen))
        return Scored(rollouts, rewards, advantages, correct), [Problem((1, 2), 3 + r.key.problem) for r in rollouts]

    return roll


def _draw(has_signal, max_resamples, step=1):
    asked_for = []
    sample = draw(
        _roll(has_signal, asked_for),
        40,
        prompts_per_step=6,
        group_size=GROUP,
        max_resamples=max_resamples,
        seed=0,
        step=step,
    )
    return sample, asked_for


def test_without_resampling_all_groups_are_kept():
    sample, asked_for = _draw(lambda _: False, 0)
    assert asked_for == [choose_problems(40, 6, 0, 1)]
    assert sample.learnt is sample.scored
    assert (sample.rounds, sample.dropped) == (1, 0)


def test_groups_without_signal_are_replaced_until_the_step_is_full():
    sample, asked_for = _draw(lambda problem: problem % 3 == 0, 20)
    problems = [problem for round_ in asked_for for problem in round_]
    assert len(set(problems)) == len(problems)
    kept = [rollout.key.problem for rollout in sample.learnt.rollouts]
    expected = [problem for problem in problems if problem % 3 == 0]
    assert kept == [problem for problem in expected for _ in range(GROUP)]
    assert len(expected) == 6
    assert len(asked_for[1]) == 6 - sum(problem % 3 == 0 for problem in asked_for[0])
    assert sample.rounds == len(asked_for) > 2
    assert sample.dropped == len(problems) - 6
    assert len(sample.scored.rollouts) == len(sample.asked) == GROUP * len(problems)
    assert [p.target - 3 for p in sample.asked] == [r.key.problem for r in sample.scored.rollouts]
    assert sample.learnt.advantages.tolist() == [1.0, -1.0] * 6
    assert sample.learnt.correct == (True, False) * 6
    again, _ = _draw(lambda problem: problem % 3 == 0, 20)
    assert [r.key for r in again.scored.rollouts] == [r.key for r in sample.scored.rollouts]


@pytest.mark.parametrize("cap", [1, 3])
def test_the_cap_is_held(cap):
    sample, asked_for = _draw(lambda _: False, cap)
    assert len(asked_for) == sample.rounds == 1 + cap
    assert sample.dropped == 6 * (1 + cap)
    assert sample.learnt.rollouts == ()
