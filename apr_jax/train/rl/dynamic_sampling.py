"""Groups without signal, dropped and refilled (DAPO, arXiv 2503.14476, section 3.2)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apr_jax.train.rl.rollouts import Scored, choose_problems

Roll = Callable[[Sequence[int]], tuple[Scored, list[Any]]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one step drew, and what it learns from."""

    scored: Scored  # every rollout, in the order drawn: what is logged
    asked: list[Any]  # the problem of each
    learnt: Scored  # what is learnt from
    rounds: int  # of rollouts; 1 without resampling
    dropped: int  # groups without signal that were left out


def draw(
    roll: Roll,
    num_problems: int,
    *,
    prompts_per_step: int,
    group_size: int,
    max_resamples: int,
    seed: int,
    step: int,
) -> Sample:
    """Rolls out a step's groups; up to `max_resamples` times replaces those without signal by groups of new problems.

    A group has no signal where all its advantages are 0. With max_resamples 0 every group is kept, signal or not.
    Otherwise the step learns from the groups that have a signal alone, which may be fewer than `prompts_per_step`, or
    none, when the cap is reached. No problem is asked twice in a step; which are asked is a function of
    (seed, step, round) and of the rewards before.

    Args:
      roll: indices of problems -> the scored rollouts of their groups, in that order, and the problem of each rollout.
    """
    chosen = choose_problems(num_problems, prompts_per_step, seed, step)
    scored, asked = roll(chosen)
    if not max_resamples:
        return Sample(scored, asked, scored, rounds=1, dropped=0)
    learnt, rounds, groups = with_signal(scored, group_size), 1, len(chosen)
    while rounds <= max_resamples and (missing := prompts_per_step - len(learnt.rollouts) // group_size):
        left = np.setdiff1d(np.arange(num_problems), chosen)
        new = [int(i) for i in np.random.default_rng((seed, step, rounds)).choice(left, missing, replace=False)]
        more, problems = roll(new)
        chosen, asked = chosen + new, asked + problems
        scored, learnt = joined(scored, more), joined(learnt, with_signal(more, group_size))
        rounds, groups = rounds + 1, groups + missing
    return Sample(scored, asked, learnt, rounds=rounds, dropped=groups - len(learnt.rollouts) // group_size)


def with_signal(scored: Scored, group_size: int) -> Scored:
    """The groups of which some rollout has an advantage."""
    kept_R = np.repeat(scored.advantages.reshape(-1, group_size).any(axis=1), group_size)
    indices = np.flatnonzero(kept_R).tolist()
    return Scored(
        tuple(scored.rollouts[i] for i in indices),
        tuple(scored.rewards[i] for i in indices),
        scored.advantages[kept_R],
        tuple(scored.correct[i] for i in indices),
        tuple(scored.shares[i] for i in indices) if scored.shares else (),
    )


def joined(first: Scored, second: Scored) -> Scored:
    """Both, one after the other."""
    return Scored(
        first.rollouts + second.rollouts,
        first.rewards + second.rewards,
        np.concatenate([first.advantages, second.advantages]),
        first.correct + second.correct,
        first.shares + second.shares,
    )
