"""The tree of programs that a rollout is made of: what each one has asked for, written and been granted. No JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.engine.groups import Group
from apr_jax.engine.threads import Call, Join, Path, Program, RolloutKey, Stop, StopReason, Thread


@dataclasses.dataclass(eq=False, slots=True)
class OpenCall:
    """A Decode under way."""

    context: np.ndarray
    clock_start: int
    start_ms: float
    first_token_ms: float = 0.0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


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

    def written(self) -> int:
        """Tokens generated in the subtree; those of cancelled threads up to their cutoff."""
        return sum(len(call.tokens) for node in self.subtree() for call in node.calls)

    def subtree(self) -> Iterator["Node"]:
        """The node and all below it, parents first."""
        yield self
        for children in self.spawns:
            for child in children:
                yield from child.subtree()


@dataclasses.dataclass(eq=False, slots=True)
class RolloutState:
    """Which rollout a tree is."""

    ordinal: int  # in its run
    key: RolloutKey
    started: float  # seconds, on the run's clock


def can_end(node: Node) -> bool:
    """Whether a program may still end by its cutoff: it, or something it waits for, is behind the cutoff."""
    if node.ended:
        return False
    if node.join is not None:
        return any(can_end(child) for child in node.spawns[node.join.handle.ordinal])
    return node.call is None or node.cutoff is None or node.clock < node.cutoff


def trim(call: Call, cutoff: int) -> Call:
    """The call as it was at the clock `cutoff`: what it wrote later is left out."""
    keep = cutoff - call.clock_start
    if len(call.tokens) <= keep:
        return call
    stop = Stop(StopReason.CANCELLED, None)
    masks = None if call.masks is None else call.masks.first(keep)
    return dataclasses.replace(call, tokens=call.tokens[:keep], logprobs=call.logprobs[:keep], stop=stop, masks=masks)
