"""Sampling the rollouts of a step, or of several at once, until enough groups have a signal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apr_jax.config import Config, GRPOConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Progress, Rollout, RolloutKey
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


@dataclasses.dataclass
class _Drawing:
    """The rollouts that were drawn for a step so far."""

    asked: list[int] = dataclasses.field(default_factory=list)  # indices of problems
    drawn: list[Scored] = dataclasses.field(default_factory=list)
    rounds: int = 0

    def add(self, asked: Sequence[int], drawn: Sequence[Scored]) -> None:
        self.asked += asked
        self.drawn += drawn
        self.rounds += bool(asked)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The engine, with the problems that it is asked."""

    config: Config
    engine: RolloutEngine
    problems: Sequence[Any]  # the train split
    held_out: Sequence[Any]  # problems to validate on
    tokenizer: Tokenizer

    def samples(self, steps: Sequence[int], on_progress: Callable[[Progress], None] | None = None) -> list[Sample]:
        """Draw and score the groups of these steps in one run of the engine; replace up to `grpo.max_resamples` times
        those without signal.

        A group has no signal where all its advantages are 0 (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).
        With `max_resamples` 0 every group is kept. Otherwise a step learns only from groups with a signal, of which
        there may be fewer than `grpo.prompts_per_step`, or none, when the cap is reached.

        The result is a function of (seed, steps), the problems and the engine's policy. A step asks no problem twice.
        `on_progress` is called as by `Engine.run`, with the rollouts of the current round.
        """
        grpo, size = self.config.grpo, self.config.grpo.group_size
        drawings = [_Drawing() for _ in steps]
        for round_ in range(grpo.max_resamples + 1):
            asked = [self._ask(step, round_, so_far) for step, so_far in zip(steps, drawings, strict=True)]
            if not any(asked):
                break
            for drawing, new, scored in zip(drawings, asked, self._draw(asked, steps[0], on_progress), strict=True):
                drawing.add(new, scored)
        samples = []
        for drawing in drawings:
            learnt = with_signal(drawing.drawn, size) if grpo.max_resamples else drawing.drawn
            dropped = (len(drawing.drawn) - len(learnt)) // size
            samples.append(Sample(drawing.drawn, learnt, drawing.rounds, dropped))
        return samples

    def accuracy(self, on_progress: Callable[[Progress], None] | None = None) -> float:
        """Return the share of the held-out problems that the engine's policy solves, decoded greedily."""
        summary, _ = evaluate(
            self.engine,
            self.held_out,
            method=self.config.data.method,
            settings=make_settings(self.config, self.tokenizer),
            seed=self.config.seed,
            temperature=0.0,
            on_progress=on_progress,
            keep_calls=0,
        )
        return float(summary["accuracy"])

    def _ask(self, step: int, round_: int, so_far: _Drawing) -> list[int]:
        """Choose problems for a step: its own in round 0, later others, one for each group without signal."""
        grpo, seed = self.config.grpo, self.config.seed
        if not round_:
            return choose_problems(len(self.problems), grpo.prompts_per_step, seed, step)
        missing = grpo.prompts_per_step - len(with_signal(so_far.drawn, grpo.group_size)) // grpo.group_size
        left = np.setdiff1d(np.arange(len(self.problems)), so_far.asked)
        chosen: list[int] = np.random.default_rng((seed, step, round_)).choice(left, missing, replace=False).tolist()
        return chosen

    def _draw(
        self, asked: Sequence[Sequence[int]], first_step: int, on_progress: Callable[[Progress], None] | None
    ) -> list[list[Scored]]:
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
        seed, temperature = rollout_seed(config.seed, first_step), config.rollout.temperature
        rollouts = self.engine.run(programs, seed=seed, temperature=temperature, on_progress=on_progress)
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
