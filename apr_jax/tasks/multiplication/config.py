"""Multiplication's section of the configuration."""

import dataclasses
from typing import Annotated

from apr_jax.config import Config, ConfigError, TaskConfig
from apr_jax.config_fields import Range, Share
from apr_jax.tasks.multiplication.numerals import NAMES

Factors = Annotated[int, Range(2, len(NAMES))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplicationConfig(TaskConfig):
    """Products of integers of 0..1,000 (ThreadWeaver, arXiv 2512.07843, has 5 to 8 of them)."""

    min_factors: Factors
    max_factors: Factors
    # Share of the factors of train that are 0, 1, 10, 100 or 1000, and not drawn from all numbers. 1000 has a digit of
    # its own, which is learnt from few examples otherwise.
    round_share: Share

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_factors > self.max_factors:
            raise ConfigError(f"task.min_factors={self.min_factors} is above task.max_factors={self.max_factors}")

    def check(self, config: Config) -> None:
        levels = (self.max_factors - 1).bit_length()
        if config.data.method == "adaptive" and 0 < config.rollout.max_depth < levels:
            raise ConfigError(
                f"rollout.max_depth={config.rollout.max_depth}: children of products of task.max_factors="
                f"{self.max_factors} spawn down to level {levels}"
            )
