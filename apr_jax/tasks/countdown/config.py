"""Countdown's section of the configuration."""

import dataclasses
from typing import Annotated, Literal

from apr_jax.config import Config, ConfigError, TaskConfig
from apr_jax.config_fields import Count, Natural, Range, Share

# Whether six numbers reach a target is known in milliseconds; each further number takes thirty times as long.
Numbers = Annotated[int, Range(2, 6, " must lie in 2..6: Countdown needs at least 2 numbers, and more are not solved")]
Number = Annotated[int, Range(1, 1_000_000)]
Target = Annotated[int, Range(1, 10_000)]  # the heuristic has a table of the numbers up to each
Beam = Annotated[int, Range(1, 10_000)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownConfig(TaskConfig):
    """Countdown problems and the searches that demonstrate them (Pan et al., section 4.1, and its released code)."""

    num_numbers: Numbers
    min_number: Number
    max_number: Number
    min_target: Target
    max_target: Target
    num_unseen_targets: Count  # targets held out of train for the split test_unseen_targets
    serial_beam_min: Beam  # SoS+: nodes kept per expansion, drawn per problem
    serial_beam_max: Beam
    serial_dfs_probability: Share  # SoS+: chance that an expansion's nodes are searched depth-first in place
    parent_beams: tuple[Beam, ...]  # APR: the parent's beam is one of these, drawn per problem; repeats weigh more
    child_beam_max: Beam  # APR: the children's beam is drawn from [parent's beam, this]
    spawn_probability: Share  # APR: chance that a parent's expansion is handed to children
    spawn_depth: Count  # APR: levels of threads that spawn; 1 = the parent alone (the reference), 2 = its children, too
    # APR: the prompt of each thread names the smallest of these, in tokens, that holds it; (): none is named.
    context_windows: tuple[Count, ...]
    retry_probability: Share  # APR: chance that the next best operations follow when all children failed; reference: 0
    heuristic: Literal["mult", "none"]  # what ranks operations; none: the order in which they were generated
    # Searches write all operations of a state, then search below each (the reference); or one by one.
    search_order: Literal["breadth_first", "depth_first"]
    restate: bool  # depth-first searches write a state again whenever they come back to it
    restate_operation: bool  # and below it the operation that they come back from
    attempts: bool  # searches write operations with too large a result, too, and before or for a quotient a division
    # APR: a parent replays the first winning path from its own root on (the reference), or repeats what the last child
    # that won handed back, word for word, which stands closest.
    parent_replay: Literal["root", "child"]
    # APR: a join has the path of the child with the shortest search alone, as rollout.cancel_on_success leaves it.
    cancel_on_success: bool
    shuffle: bool  # kept operations: in random order (the reference) or the order in which they were generated (fixed)
    max_result: Natural  # searches leave out operations whose result is larger; reference: 0, which leaves out none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_windows != tuple(sorted({*self.context_windows})):
            raise ConfigError(f"task.context_windows={self.context_windows}: name distinct sizes from 1, in order")
        if not self.parent_beams:
            raise ConfigError(f"task.parent_beams={self.parent_beams}: name at least one beam")
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
        if self.restate and self.search_order != "depth_first":
            raise ConfigError("task.restate=True: only task.search_order='depth_first' comes back to states")
        if self.restate_operation and not self.restate:
            raise ConfigError("task.restate_operation=True: below states that are written again, set task.restate=True")
        if self.attempts and (self.heuristic != "none" or self.shuffle):
            raise ConfigError(
                "task.attempts=True: attempts have their place among operations in the order in which they are "
                "generated; set task.heuristic='none' and task.shuffle=False"
            )
        if self.max_result and self.max_result < self.min_number:
            raise ConfigError(f"task.max_result={self.max_result} is below task.min_number={self.min_number}")

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
