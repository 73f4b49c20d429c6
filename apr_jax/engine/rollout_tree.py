"""The tree of programs that a rollout is made of: what each one has asked for, written and been granted. No JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.engine.groups import Group
from apr_jax.engine.threads import Call, Join, Path, Program, RolloutKey, Thread


@dataclasses.dataclass(eq=False, slots=True)
class OpenCall:
    """A Decode under way."""

    context: np.ndarray
    clock_start: int
    start_ms: float
    first_token_ms: float = 0.0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    kept: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A program in its rollout's tree."""

    generator: Program
    path: Path
    rollout: "RolloutState"
    parent: "Node | None"
    clock: int
    left: int  # tokens of its rollout that it may still generate or hand to children
    granted: int  # what it began with
    group: Group | None = None  # of a worker on a shared cache
    decided: bool = False  # such a worker has asked for its Decode, or ended
    thread: Thread | None = None
    spawns: list[list["Node"]] = dataclasses.field(default_factory=list)
    unjoined: set[int] = dataclasses.field(default_factory=set)  # ordinals of spawns not joined yet
    join: Join | None = None  # what it waits for
    call: OpenCall | None = None
    calls: list[Call] = dataclasses.field(default_factory=list)
    ended: bool = False
    cancelled: bool = False
    value: Any = None
    succeeded: bool = False
    cutoff: int | None = None  # the clock at which a sibling's success (or an ancestor's sibling's) ends it

    @property
    def joined(self) -> list["Node"]:
        """The children that the program waits for; none where it waits for no spawn."""
        return [] if self.join is None else self.spawns[self.join.handle.ordinal]

    def written(self) -> int:
        """Count the tokens generated in the subtree; those of cancelled threads up to their cutoff."""
        return sum(len(call.tokens) for node in self.subtree() for call in node.calls)

    def subtree(self) -> Iterator["Node"]:
        """Yield the node and all below it, parents first."""
        yield self
        for children in self.spawns:
            for child in children:
                yield from child.subtree()


@dataclasses.dataclass(eq=False, slots=True)
class RolloutState:
    """The rollout that a tree belongs to."""

    ordinal: int  # in its run
    key: RolloutKey
    started: float  # seconds, on the run's clock
