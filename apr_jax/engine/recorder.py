"""Keeps what the programs of a run wrote: calls, open and closed, and finished rollouts; tells an observer. No JAX."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from apr_jax.engine.rollout_tree import Node, OpenCall
from apr_jax.engine.threads import Call, Happening, Observer, Rollout, Stop
from apr_jax.engine.work_counters import Work


class Recorder:
    """The record of one run."""

    def __init__(self, num_rollouts: int, now: Callable[[], float], observer: Observer | None):
        """Make a recorder; `now` is a clock in seconds."""
        self.now, self._observer = now, observer
        self._rollouts: list[Rollout | None] = [None] * num_rollouts
        self.finished = 0

    def results(self) -> list[Rollout]:
        """Return all rollouts, in the order of their programs. Raises AssertionError while one is unfinished."""
        finished = [rollout for rollout in self._rollouts if rollout is not None]
        assert len(finished) == len(self._rollouts), "a program was lost"
        return finished

    def tell(self, node: Node, happening: Happening) -> None:
        """Tell the observer what happened to a program's thread, if it has one."""
        if self._observer is not None and node.thread is not None:
            self._observer(node.rollout.key, node.thread, happening)

    def open_call(self, node: Node) -> None:
        """Begin the record of a Decode."""
        assert node.thread is not None
        node.call = OpenCall(np.asarray(node.thread.tokens, np.int32), node.clock, self._ms(node))

    def wrote(self, node: Node, tokens: Sequence[int], logprobs: Sequence[float], kept: Sequence[int]) -> None:
        """Add tokens to the open call."""
        assert node.call is not None
        if not node.call.tokens:
            node.call.first_token_ms = self._ms(node)
        node.call.tokens.extend(tokens)
        node.call.logprobs.extend(logprobs)
        node.call.kept.extend(kept)
        self.tell(node, Happening.WROTE)

    def close_call(self, node: Node, stop: Stop) -> None:
        """End the record of a Decode; one that wrote nothing leaves none."""
        call, node.call = node.call, None
        assert call is not None
        if not call.tokens:
            return
        assert node.thread is not None
        node.thread.logprob += math.fsum(call.logprobs)
        constraint = node.thread.constraint
        node.calls.append(
            Call(
                path=node.path,
                context=call.context,
                tokens=np.asarray(call.tokens, np.int32),
                logprobs=np.asarray(call.logprobs, np.float32),
                stop=stop,
                clock_start=call.clock_start,
                start_ms=call.start_ms,
                end_ms=self._ms(node),
                first_token_ms=call.first_token_ms,
                kept=np.asarray(call.kept, np.int32) if call.kept else None,
                masks=None if constraint is None else constraint.masks(),
                group_prompt=0 if node.group is None else len(node.group.prompt),
            )
        )

    def finish(self, root: Node) -> None:
        """Make the rollout of a root program that has ended."""
        nodes = sorted(root.subtree(), key=lambda node: node.path)
        groups = {node.group for node in nodes if node.group is not None}
        across = Work(attended=sum(group.attended_across() for group in groups))
        self._rollouts[root.rollout.ordinal] = Rollout(
            key=root.rollout.key,
            result=root.value,
            calls=tuple(call for node in nodes for call in node.calls),
            sequential_tokens=root.clock,
            latency_ms=self._ms(root),
            work=sum((node.thread.cached.work for node in nodes if node.thread is not None), across),
        )
        self.finished += 1

    def _ms(self, node: Node) -> float:
        return (self.now() - node.rollout.started) * 1e3
