"""Multiplication: the product of 5 to 8 integers of 0..1,000, ThreadWeaver's reproduction task (arXiv 2512.07843)."""

import random
from collections.abc import Callable, Hashable
from types import MappingProxyType
from typing import Any

from apr_jax.config import Config
from apr_jax.tasks.base import Split, Task, Verdict
from apr_jax.tasks.multiplication import rules
from apr_jax.tasks.multiplication.adaptive import ADAPTIVE, asked_sums, write_columns
from apr_jax.tasks.multiplication.config import MultiplicationConfig
from apr_jax.tasks.multiplication.numerals import (
    LARGEST_FACTOR,
    PLACES,
    count_right,
    read_steps,
    take_steps,
    write_steps,
)
from apr_jax.tasks.multiplication.rules import Problem
from apr_jax.tasks.multiplication.serial import SERIAL, written_sums

_ROUND = (0, 1, 10, 100, LARGEST_FACTOR)


class Multiplication(Task):
    """Problems are tuples of factors, answers their product in decimal digits."""

    name = "multiplication"
    section = MultiplicationConfig
    problem_fields = ("min_factors", "max_factors", "round_share")
    dialects = MappingProxyType({"adaptive": ADAPTIVE, "serial": SERIAL})
    example = "742*103*15*0*1000"
    counts_by_context = True

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Problem]:
        task = config.task
        assert isinstance(task, MultiplicationConfig)
        round_share = task.round_share if split == "train" else 0.0

        def sample(rng: random.Random) -> Problem:
            count = rng.randint(task.min_factors, task.max_factors)
            return tuple(
                rng.choice(_ROUND) if rng.random() < round_share else rng.randint(0, LARGEST_FACTOR)
                for _ in range(count)
            )

        return sample

    def verify(self, answer: str | None, problem: Problem) -> Verdict:
        return rules.verify(answer, problem)

    def describe(self, problem: Problem) -> dict[str, Any]:
        return {"title": "*".join(map(str, problem))}

    def read_problem(self, value: Any) -> Problem:
        return rules.read_problem(value)

    def key(self, problem: Problem) -> Hashable:
        return tuple(sorted(problem))

    def departures(self, problem: Problem, section: Any) -> list[str]:
        low, high = section.min_factors, section.max_factors
        return [] if low <= len(problem) <= high else [f"{len(problem)} factors, not {low} to {high}"]

    def count_operations(self, text: str, context: str = "") -> tuple[int, int]:
        """Count the steps of rows and sums; a step is right if it follows from what stands before it."""
        sums = asked_sums(context)
        written = list(written_sums(text)) if sums is None else [(sums, read_steps(text))]
        return sum(len(steps) for _, steps in written), sum(count_right(sums, steps) for sums, steps in written)

    def draw_fact(self, rng: random.Random, section: Any) -> tuple[str, str]:
        """Draw a join of 2 to 4 numbers, and the steps of their sum.

        A demonstration writes five rows for each sum, and its only sum of four numbers last. So bare sums are needed to
        learn adding as fast as multiplying.
        """
        count, length = rng.randint(2, 4), rng.randint(2, len(PLACES))
        columns = [[rng.randrange(10) * (rng.random() < 0.8) for _ in range(count)] for _ in range(length - 1)]
        sums = [*map(sum, columns), 0]
        return write_columns([*columns, [0] * count]), write_steps(take_steps(sums))


MULTIPLICATION = Multiplication()
