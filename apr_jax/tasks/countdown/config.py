"""Countdown's section of the configuration."""

import dataclasses
from typing import Literal

from apr_jax.config import Config, ConfigError, TaskConfig, not_negative, positive, share


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownConfig(TaskConfig):
    """Countdown problems and the searches that demonstrate them (Pan et al., section 4.1, and its released code)."""

    num_numbers: int
    min_number: int
    max_number: int
    min_target: int
    max_target: int
    num_unseen_targets: int  # targets held out of train for the split test_unseen_targets
    serial_beam_min: int  # SoS+: nodes kept per expansion, drawn per problem
    serial_beam_max: int
    serial_dfs_probability: float  # SoS+: chance that an expansion's nodes are searched depth-first in place
    parent_beams: tuple[int, ...]  # APR: the parent's beam is one of these, drawn per problem; repeats weigh more
    child_beam_max: int  # APR: the children's beam is drawn from [parent's beam, this]
    spawn_probability: float  # APR: chance that a parent's expansion is handed to children
    spawn_depth: int  # APR: levels of threads that spawn; 1 = the parent alone (the reference), 2 = its children, too
    # APR: the prompt of each thread names the smallest of these, in tokens, that holds it; (): none is named.
    context_windows: tuple[int, ...]
    retry_probability: float  # APR: chance that the next best operations follow when all children failed; reference: 0
    heuristic: Literal["mult", "none"]  # what ranks operations; none: the order in which they were generated
    shuffle: bool  # kept operations: in random order (the reference) or the order in which they were generated (fixed)
    max_result: int  # SoS+ and APR leave out operations whose result is larger; reference: 0, which leaves out none

    def __post_init__(self) -> None:
        positive(self, "task", "num_numbers min_number num_unseen_targets serial_beam_min spawn_depth")
        if self.context_windows != tuple(sorted({*self.context_windows})) or min(self.context_windows, default=1) < 1:
            raise ConfigError(f"task.context_windows={self.context_windows}: name distinct sizes from 1, in order")
        if not self.parent_beams or min(self.parent_beams) < 1:
            raise ConfigError(f"task.parent_beams={self.parent_beams}: name at least one beam, each at least 1")
        for low, high in (
            ("min_number", "max_number"),
            ("min_target", "max_target"),
            ("serial_beam_min", "serial_beam_max"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(f"task.{low}={getattr(self, low)} is above task.{high}={getattr(self, high)}")
        if max(self.parent_beams) > self.child_beam_max:
            raise ConfigError(
                f"task.parent_beams={self.parent_beams} holds {max(self.parent_beams)}, which is above "
                f"task.child_beam_max={self.child_beam_max}"
            )
        not_negative(self, "task", "max_result")
        share(self, "task", "serial_dfs_probability spawn_probability retry_probability")
        if self.num_numbers < 2:
            raise ConfigError(f"task.num_numbers={self.num_numbers}: Countdown needs at least 2 numbers")

    @property
    def windows(self) -> tuple[int, ...]:
        return self.context_windows

    def check(self, config: Config) -> None:
        windows, levels, adaptive = self.context_windows, self.spawn_depth, config.data.method == "adaptive"
        if windows and not adaptive:
            raise ConfigError(f"task.context_windows={windows}: only data.method='adaptive' names windows")
        if levels > 1 and not adaptive:
            raise ConfigError(f"task.spawn_depth={levels}: only data.method='adaptive' has children that spawn, set 1")
        if levels > max(1, config.rollout.max_depth):  # max_depth=0 is how a policy is kept from spawning
            raise ConfigError(
                f"task.spawn_depth={levels} is above rollout.max_depth={config.rollout.max_depth}: "
                "what demonstrations spawn could not be decoded"
            )
