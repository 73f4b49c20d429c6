"""Sampling the rollouts of a step, or of several at once, until enough groups have a signal."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from apr_jax.config import Config, GRPOConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Rollout, RolloutKey
from apr_jax.evaluation.run import evaluate
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.settings import make_settings
from apr_jax.tasks.base import Task
from apr_jax.train.hosted_engine import RolloutEngine
from apr_jax.train.rl.credit import CREDITS
from apr_jax.train.rl.objective import choose_objective
from apr_jax.train.rl.reward import reward


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout, and what it earned."""

    problem: Any
    rollout: Rollout
    correct: bool  # the answer was verified
    reward: float
    advantage: float
    shares: np.ndarray  # float64, the share that each call has in the advantage (credit.py)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The rollouts of one step. The `grpo.group_size` rollouts of a group lie next to each other."""

    drawn: list[Scored]  # all, in the order in which they were drawn: what is logged
    learnt: list[Scored]  # those that the update learns from
    rounds: int  # of rollouts; 1 without resampling
    dropped: int  # groups without signal that were left out


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The engine, with the problems that it is asked."""

    config: Config
    engine: RolloutEngine
    problems: Sequence[Any]  # the train split
    held_out: Sequence[Any]  # problems to validate on
    tokenizer: Tokenizer

    def samples(self, steps: Sequence[int]) -> list[Sample]:
        """Draw and score the groups of these steps in one run of the engine; replace up to `grpo.max_resamples` times
        those without signal.

        A group has no signal where all its advantages are 0 (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).
        With `max_resamples` 0 every group is kept. Otherwise a step learns only from groups with a signal, of which
        there may be fewer than `grpo.prompts_per_step`, or none, when the cap is reached.

        The result is a function of (seed, steps), the problems and the engine's policy. A step asks no problem twice.
        """
        grpo, seed, size = self.config.grpo, self.config.seed, self.config.grpo.group_size
        asked = [choose_problems(len(self.problems), grpo.prompts_per_step, seed, step) for step in steps]
        drawn = self._draw(asked, steps[0])
        if not grpo.max_resamples:
            return [Sample(each, each, rounds=1, dropped=0) for each in drawn]
        rounds = [1] * len(steps)
        for round_ in range(1, grpo.max_resamples + 1):
            missing = [grpo.prompts_per_step - len(with_signal(each, size)) // size for each in drawn]
            if not any(missing):
                break
            new = []
            for step, before, count in zip(steps, asked, missing, strict=True):
                left = np.setdiff1d(np.arange(len(self.problems)), before)
                new.append(np.random.default_rng((seed, step, round_)).choice(left, count, replace=False).tolist())
            more = self._draw(new, steps[0])
            asked = [before + added for before, added in zip(asked, new, strict=True)]
            drawn = [before + added for before, added in zip(drawn, more, strict=True)]
            rounds = [before + (count > 0) for before, count in zip(rounds, missing, strict=True)]
        learnt = [with_signal(each, size) for each in drawn]
        return [
            Sample(all_, some, rounds=number, dropped=(len(all_) - len(some)) // size)
            for all_, some, number in zip(drawn, learnt, rounds, strict=True)
        ]

    def accuracy(self) -> float:
        """Return the share of the held-out problems that the engine's policy solves, decoded greedily."""
        summary, _ = evaluate(
            self.engine,
            self.held_out,
            method=self.config.data.method,
            settings=make_settings(self.config, self.tokenizer),
            seed=self.config.seed,
            temperature=0.0,
            keep_calls=0,
        )
        return float(summary["accuracy"])

    def _draw(self, asked: Sequence[Sequence[int]], first_step: int) -> list[list[Scored]]:
        """Roll out and score a group for each problem, given by index, of each of the steps from `first_step` on.

        The engine begins the groups of a step when lanes fall free of the one before.
        """
        config, size = self.config, self.config.grpo.group_size
        settings = make_settings(config, self.tokenizer)
        # Two steps may ask the same problem: each has sample numbers of its own.
        keys = [
            RolloutKey(index, ahead * size + number)
            for ahead, indices in enumerate(asked)
            for index in indices
            for number in range(size)
        ]
        problems = [self.problems[key.problem] for key in keys]
        programs = [
            (key, make_program(config.data.method, problem, settings))
            for key, problem in zip(keys, problems, strict=True)
        ]
        temperature = config.rollout.temperature
        rollouts = self.engine.run(programs, seed=rollout_seed(config.seed, first_step), temperature=temperature)
        ends = np.cumsum([len(indices) * size for indices in asked]).tolist()
        return [
            score(config.grpo, rollouts[begin:end], problems[begin:end], self.tokenizer, settings.task)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]


def score(
    grpo: GRPOConfig, rollouts: Sequence[Rollout], problems: Sequence[Any], tokenizer: Tokenizer, task: Task
) -> list[Scored]:
    """Verify every rollout's answer, and give it a reward, an advantage in its group, and shares for its calls.

    Malformed and cut-off rollouts have no answer, so they are wrong. Raises TaskLacksError as `credit.used_threads`.
    """
    answers = [rollout.result.answer for rollout in rollouts]
    correct = [task.verify(answer, problem).correct for answer, problem in zip(answers, problems, strict=True)]
    rewards = [reward(rollout, right, grpo.reward) for rollout, right in zip(rollouts, correct, strict=True)]
    advantages = choose_objective(grpo).advantages(grpo, rewards).tolist()
    shares = [CREDITS[grpo.credit](rollout, tokenizer, task) for rollout in rollouts]
    columns = zip(problems, rollouts, correct, rewards, advantages, shares, strict=True)
    return [Scored(*column) for column in columns]


def with_signal(scored: Sequence[Scored], group_size: int) -> list[Scored]:
    """Return the groups in which some rollout has an advantage."""
    groups = [scored[begin : begin + group_size] for begin in range(0, len(scored), group_size)]
    return [each for group in groups if any(each.advantage for each in group) for each in group]


def choose_problems(num_problems: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """Return the indices of a step's first problems: distinct, and the same whenever (seed, step) is."""
    if prompts_per_step > num_problems:
        raise ValueError(f"grpo.prompts_per_step={prompts_per_step} exceeds the {num_problems} problems there are")
    chosen: list[int] = (
        np.random.default_rng((seed, step)).choice(num_problems, prompts_per_step, replace=False).tolist()
    )
    return chosen


def rollout_seed(seed: int, step: int) -> int:
    """Return the engine's seed of a step, below 2^31."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0] >> 1)
