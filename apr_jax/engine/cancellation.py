"""First success: the child whose value succeeds first, on the clock of sequential tokens, cancels its siblings. No JAX.

The *cutoff* is that child's clock. Siblings run on up to the cutoff, for one of them may still succeed earlier. What is
beyond it is cancelled, and what it wrote is trimmed to the cutoff. So the outcome does not depend on the schedule.
"""

import dataclasses
from collections.abc import Callable

from apr_jax.engine.recorder import Recorder
from apr_jax.engine.rollout_tree import Node
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.threads import Call, Happening, Stop, StopReason

_CANCELLED = Stop(StopReason.CANCELLED, None)


class Cancellation:
    """The cancellation of programs whose siblings succeeded first."""

    def __init__(self, scheduler: Scheduler, recorder: Recorder, resume: Callable[[Node], None]):
        """Call `resume` with each program whose joined children have all ended."""
        self._scheduler, self._recorder, self._resume = scheduler, recorder, resume

    def settle(self, node: Node) -> None:
        """Apply the first success of the children that `node` waits for; resume it when all have ended."""
        successes = [child.clock for child in node.joined if child.succeeded]
        if successes:
            cutoff = max(min(successes), node.clock)
            for child in node.joined:
                if not child.ended or child.clock > cutoff:
                    self._cut(child, cutoff)
        if all(child.ended for child in node.joined):
            self._resume(node)

    def settle_above(self, node: Node) -> None:
        """Settle the ancestors of a program below a cutoff that came to rest, inner ones first.

        They may be unable now to end by the cutoff.
        """
        ancestor = node.parent if node.cutoff is not None else None
        while ancestor is not None:
            if any(child.succeeded for child in ancestor.joined):
                self.settle(ancestor)
            ancestor = ancestor.parent

    def park(self, node: Node) -> None:
        """Stop a thread that has reached its cutoff: its pages are free at once."""
        assert node.thread is not None
        self._scheduler.release(node.thread)
        self.settle_above(node)

    def _cut(self, child: Node, cutoff: int) -> None:
        """End a child's subtree at the cutoff; what is still before it runs on up to there."""
        for node in child.subtree():
            node.cutoff = cutoff if node.cutoff is None else min(node.cutoff, cutoff)
            if not node.ended and node.call is not None and node.clock >= node.cutoff and node.thread is not None:
                self._scheduler.release(node.thread)
        if child.ended or not can_end(child):
            self._cancel(child, cutoff)

    def _cancel(self, child: Node, cutoff: int) -> None:
        """End a subtree and trim what it wrote to the cutoff."""
        for node in child.subtree():
            if node.call is not None:
                self._recorder.close_call(node, _CANCELLED)
            if not node.ended:
                node.generator.close()
                if node.thread is not None:
                    self._scheduler.release(node.thread)
            node.calls = [trim(call, cutoff) for call in node.calls if call.clock_start < cutoff]
            if not node.cancelled:
                self._recorder.tell(node, Happening.CANCELLED)
            node.ended = node.cancelled = True
            node.succeeded, node.value, node.join = False, None, None
            node.clock = min(node.clock, cutoff)
        child.clock = cutoff


def can_end(node: Node) -> bool:
    """Return True where a program may still end by its cutoff: it, or something it waits for, is before the cutoff."""
    if node.ended:
        return False
    if node.join is not None:
        return any(can_end(child) for child in node.joined)
    return node.call is None or node.cutoff is None or node.clock < node.cutoff


def trim(call: Call, cutoff: int) -> Call:
    """Return the call as it was at the cutoff, without what it wrote later."""
    keep = cutoff - call.clock_start
    if len(call.tokens) <= keep:
        return call
    masks = None if call.masks is None else call.masks.first(keep)
    kept = None if call.kept is None else call.kept[:keep]
    tokens, logprobs = call.tokens[:keep], call.logprobs[:keep]
    return dataclasses.replace(call, tokens=tokens, logprobs=logprobs, stop=_CANCELLED, kept=kept, masks=masks)
