"""Drives programs: turns their requests into work for the scheduler, keeps the clock and records calls. No JAX.

The clock counts sequential tokens: a child's starts at its parent's at the spawn, decoding n tokens adds n, and a
join sets the parent's to the latest of its own and its children's.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apr_jax.engine.constraints import Constraint, Gate
from apr_jax.engine.groups import Group, row_limit
from apr_jax.engine.rollout_tree import Node, OpenCall, RolloutState, can_end, trim
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.threads import (
    MAX_STOP_TOKENS,
    Append,
    Call,
    Decode,
    Happening,
    Join,
    Observer,
    Open,
    Prefill,
    Program,
    Request,
    Rollout,
    RolloutKey,
    Share,
    Spawn,
    SpawnHandle,
    Status,
    Stop,
    StopReason,
    Thread,
    Truncate,
    thread_key,
)
from apr_jax.engine.work_counters import Work


class Programs:
    """All programs of one run."""

    def __init__(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        scheduler: Scheduler,
        *,
        seed: int,
        max_seq_len: int,
        max_steps: int,
        max_total_tokens: int,
        now: Callable[[], float],
        gate: Gate | None = None,
        observer: Observer | None = None,
    ):
        self._waiting = collections.deque(enumerate(programs))
        self._scheduler = scheduler
        self._seed = seed
        self._max_seq_len = max_seq_len
        self._max_steps = max_steps
        self._max_total_tokens = max_total_tokens
        self._now = now  # seconds
        self._gate = gate
        self._observer = observer
        self._queue: collections.deque[tuple[Node, Any]] = collections.deque()
        self._node_of: dict[Thread, Node] = {}
        self._rollouts: list[Rollout | None] = [None] * len(programs)
        self.finished = 0

    def start_next(self) -> bool:
        """Starts the next root program and runs it until it waits. False: all have been started."""
        if not self._waiting:
            return False
        ordinal, (key, program) = self._waiting.popleft()
        rollout = RolloutState(ordinal, key, self._now())
        total = self._max_total_tokens
        self._queue.append((Node(program, (), rollout, parent=None, clock=0, left=total, granted=total), None))
        self.drain()
        return True

    def decoded(
        self, thread: Thread, tokens: list[int], logprobs: list[float], shut_logprobs: Sequence[float] = ()
    ) -> None:
        """The device wrote these tokens for a thread. Queues its program if its Decode is over (see `drain`).

        `shut_logprobs`, the log-probabilities without the gate token, are read where the thread has a grammar. A
        thread that asked for a Prefill has been given a lane to write nothing.
        """
        node = self._node_of[thread]
        if node.call is None:
            assert not tokens
            self._scheduler.leave_lane(thread, Status.IDLE)
            self._queue.append((node, None))
            return
        thread.work = thread.work.with_decode(len(thread.tokens) - 1, len(tokens))
        if thread.constraint is not None:
            drawn = len(tokens)
            tokens, logprobs = thread.constraint.take(thread.tokens, tokens, logprobs, shut_logprobs)
            thread.rejected += drawn - len(tokens)
        self._scheduler.decoded(thread, tokens)
        if not node.call.tokens:
            node.call.first_token_ms = self._ms(node)
        node.call.tokens.extend(tokens)
        node.call.logprobs.extend(logprobs)
        node.clock += len(tokens)
        node.left -= len(tokens)
        self._tell(node, Happening.WROTE)
        stop = self._stop(thread) if tokens else None
        if node.cutoff is not None and (node.clock > node.cutoff or (stop is None and node.clock == node.cutoff)):
            self._park(node)
        elif stop is not None:
            self._scheduler.leave_lane(thread, Status.IDLE)
            self._close_call(node, stop)
            self._queue.append((node, stop))

    def drain(self) -> None:
        """Runs every program that can go on, until all wait for the device or for children."""
        while self._queue:
            node, value = self._queue.popleft()
            if not node.cancelled:
                self._advance(node, value)

    def results(self) -> list[Rollout]:
        """All rollouts, in the order of their programs. Raises AssertionError while one is unfinished."""
        finished = [rollout for rollout in self._rollouts if rollout is not None]
        assert len(finished) == len(self._rollouts), "a program was lost"
        return finished

    def abandon(self) -> None:
        """After an exception: frees every thread and closes every generator."""
        for node in self._node_of.values():
            if node.thread is not None:
                self._scheduler.release(node.thread)
            node.generator.close()

    def _advance(self, node: Node, value: Any) -> None:
        while True:
            try:
                request = node.generator.send(value)
            except StopIteration as stop:
                self._end(node, stop.value)
                return
            if isinstance(request, Decode):
                instant = self._decode(node, request)
                if instant is None:
                    return
                value = instant
            elif isinstance(request, Join) and node.group is None:
                self._join(node, request)
                return
            elif isinstance(request, Prefill):
                if self._prefill(node, request.thread):
                    return
                value = None
            else:
                value = self._serve(node, request)

    def _serve(self, node: Node, request: Request) -> Any:
        """Requests that are answered at once."""
        if node.group is not None and not isinstance(request, Open):
            raise ValueError(f"worker {node.path} asked for {request!r}; a worker opens its thread and decodes once")
        match request:
            case Open():
                return self._open(node, request)
            case Truncate(thread, length):
                self._own(node, thread)
                if not 1 <= length <= len(thread.tokens):
                    raise ValueError(f"cannot truncate a thread of {len(thread.tokens)} tokens to {length}")
                self._scheduler.truncate(thread, length)
                return None
            case Append(thread, tokens):
                self._own(node, thread)
                thread.tokens.extend(tokens)
                return None
            case Spawn(programs):
                return self._spawn(node, programs)
            case Share(prompt, programs):
                if not prompt or not programs:
                    raise ValueError(f"program {node.path} asked for a Share without a prompt or without programs")
                return self._spawn(node, programs, Group(tuple(prompt), len(programs), len(programs)))
            case _:
                raise TypeError(f"a program yielded {request!r}, which is no request")

    def _open(self, node: Node, request: Open) -> Thread:
        if node.thread is not None:
            raise ValueError(f"program {node.path} opened a second thread")
        parent = request.fork_of
        tokens = [*(parent.tokens if parent is not None else ()), *request.tokens]
        if not tokens:
            raise ValueError(f"program {node.path} opened a thread without tokens")
        if node.group is not None:
            if parent is not None:
                raise ValueError(f"worker {node.path} opened a fork; its group's prompt stands before its tokens")
            tokens = [*node.group.prompt, *tokens]
        key = thread_key(self._seed, node.rollout.key, node.path)
        max_length = min(self._max_seq_len, request.max_length or self._max_seq_len)
        if node.group is not None:
            part = row_limit(self._max_seq_len, len(node.group.prompt), node.group.size, node.path[-1])
            max_length = min(max_length, part)
        node.thread = Thread(node.path, tokens, node.rollout.ordinal, key, max_length=max_length, group=node.group)
        self._node_of[node.thread] = node
        if parent is not None:
            self._scheduler.fork(parent, node.thread)
        self._tell(node, Happening.OPENED)
        return node.thread

    def _prefill(self, node: Node, thread: Thread) -> bool:
        """Hands the thread to the scheduler, with nothing to write. False: there is nothing to be computed for."""
        self._own(node, thread)
        if len(thread.tokens) >= thread.max_length:
            return False
        thread.stop_tokens, thread.constraint = (), None
        thread.max_generated = thread.generated
        self._scheduler.submit(thread)
        return True

    def _decode(self, node: Node, request: Decode) -> Stop | None:
        """Hands the thread to the scheduler, or returns the Stop of one that can't decode."""
        thread = request.thread
        self._own(node, thread)
        if node.group is not None and (node.decided or request.grammar is not None):
            raise ValueError(f"worker {node.path} decodes once, and without a grammar")
        if len(request.stop_tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"{len(request.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} can be matched")
        thread.stop_tokens = tuple(request.stop_tokens)
        budget = node.left if request.max_tokens is None else min(node.left, request.max_tokens)
        thread.max_generated = min(self._max_steps, thread.generated + budget)
        thread.constraint = None
        if request.grammar is not None:
            if self._gate is None:
                raise ValueError("a Decode with a grammar needs an engine with a gate")
            thread.constraint = Constraint(self._gate, request.grammar)
        limit = self._limit(thread)
        if limit is not None:
            self._decide(node, None)
            return Stop(limit, None)
        node.call = OpenCall(np.asarray(thread.tokens, np.int32), node.clock, self._ms(node))
        if node.cutoff is not None and node.clock >= node.cutoff:
            self._decide(node, None)
            self._park(node)
        elif node.group is not None:
            self._decide(node, thread)
        else:
            self._scheduler.submit(thread)
        return None

    def _decide(self, node: Node, worker: Thread | None) -> None:
        """A worker asked for its Decode (None: it won't decode): the last one to do so starts its group."""
        if node.group is None or node.decided:
            return
        node.decided = True
        if node.group.decide(worker):
            self._scheduler.submit_group(node.group)

    def _limit(self, thread: Thread) -> StopReason | None:
        if len(thread.tokens) >= thread.max_length:
            return StopReason.LENGTH
        if thread.generated >= self._max_steps:
            return StopReason.MAX_STEPS
        return StopReason.BUDGET if thread.generated >= thread.max_generated else None

    def _stop(self, thread: Thread) -> Stop | None:
        if thread.tokens[-1] in thread.stop_tokens:
            return Stop(StopReason.TOKEN, thread.tokens[-1])
        limit = self._limit(thread)
        return None if limit is None else Stop(limit, None)

    def _own(self, node: Node, thread: Thread) -> None:
        if thread is not node.thread:
            raise ValueError(f"program {node.path} asked for the thread {thread.path} of another program")

    def _spawn(self, node: Node, programs: Sequence[Program], group: Group | None = None) -> SpawnHandle:
        ordinal, share = len(node.spawns), node.left // (len(programs) + 1)
        children = [
            Node(
                program,
                (*node.path, ordinal, child),
                node.rollout,
                node,
                node.clock,
                share,
                share,
                group=group,
                cutoff=node.cutoff,
            )
            for child, program in enumerate(programs)
        ]
        node.left -= share * len(children)
        node.spawns.append(children)
        node.unjoined.add(ordinal)
        self._queue.extend((child, None) for child in children)
        return SpawnHandle(ordinal, len(children))

    def _join(self, node: Node, request: Join) -> None:
        if request.handle.ordinal not in node.unjoined:
            raise ValueError(f"program {node.path} joined a spawn that it never made, or joined before")
        node.unjoined.remove(request.handle.ordinal)
        node.join = request
        if node.thread is not None:
            node.thread.status = Status.WAITING_ON_CHILDREN
        self._tell(node, Happening.WAITS)
        for child in node.spawns[request.handle.ordinal]:
            if child.ended:
                child.succeeded = request.success is not None and request.success(child.value)
        self._settle(node)
        self._settle_above(node)

    def _end(self, node: Node, value: Any) -> None:
        if node.unjoined:
            raise RuntimeError(f"program {node.path} returned without joining {len(node.unjoined)} of its spawns")
        node.ended, node.value = True, value
        self._decide(node, None)
        self._tell(node, Happening.ENDED)
        if node.thread is not None:
            self._scheduler.release(node.thread)
        parent = node.parent
        if parent is None:
            self._finish(node)
        elif parent.join is not None and node.path[-2] == parent.join.handle.ordinal:
            node.succeeded = parent.join.success is not None and parent.join.success(value)
            self._settle(parent)
            self._settle_above(parent)

    def _settle(self, node: Node) -> None:
        """Applies the first success to the children that `node` waits for, and resumes it when all have ended."""
        assert node.join is not None
        children = node.spawns[node.join.handle.ordinal]
        successes = [child.clock for child in children if child.succeeded]
        if successes:
            cutoff = max(min(successes), node.clock)
            for child in children:
                if not child.ended or child.clock > cutoff:
                    self._cut(child, cutoff)
        if not all(child.ended for child in children):
            return
        node.clock = max([node.clock, *(child.clock for child in children)])
        node.left += sum(child.granted - child.written() for child in children)
        node.join = None
        if node.thread is not None:
            node.thread.status = Status.IDLE
        self._tell(node, Happening.RESUMED)
        self._queue.append((node, [None if child.cancelled else child.value for child in children]))

    def _cut(self, child: Node, cutoff: int) -> None:
        """Ends a child's subtree at the clock `cutoff`; what is still behind it runs on up to there."""
        for node in child.subtree():
            node.cutoff = cutoff if node.cutoff is None else min(node.cutoff, cutoff)
            if not node.ended and node.call is not None and node.clock >= node.cutoff and node.thread is not None:
                self._scheduler.release(node.thread)
        if child.ended or not can_end(child):
            self._cancel(child, cutoff)

    def _park(self, node: Node) -> None:
        """The thread has reached its cutoff: its pages are free at once, and whoever waits for it is told."""
        assert node.thread is not None
        self._scheduler.release(node.thread)
        self._settle_above(node)

    def _settle_above(self, node: Node) -> None:
        """A program below a cutoff came to rest: cancels ancestors that thereby cannot end by it, inner ones first."""
        ancestor = node.parent if node.cutoff is not None else None
        while ancestor is not None:
            if ancestor.join is not None and any(c.succeeded for c in ancestor.spawns[ancestor.join.handle.ordinal]):
                self._settle(ancestor)
            ancestor = ancestor.parent

    def _cancel(self, child: Node, cutoff: int) -> None:
        """Ends a subtree and trims what it wrote to the clock `cutoff`."""
        for node in child.subtree():
            if node.call is not None:
                self._close_call(node, Stop(StopReason.CANCELLED, None))
            if not node.ended:
                node.generator.close()
                if node.thread is not None:
                    self._scheduler.release(node.thread)
            node.calls = [trim(call, cutoff) for call in node.calls if call.clock_start < cutoff]
            if not node.cancelled:
                self._tell(node, Happening.CANCELLED)
            node.ended = node.cancelled = True
            node.succeeded, node.value, node.join = False, None, None
            node.clock = min(node.clock, cutoff)
        child.clock = cutoff

    def _close_call(self, node: Node, stop: Stop) -> None:
        call, node.call = node.call, None
        assert call is not None
        constraint = node.thread.constraint if node.thread is not None else None
        if call.tokens:
            if node.thread is not None:
                node.thread.logprob += math.fsum(call.logprobs)
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
                    masks=None if constraint is None else constraint.masks(),
                    shared_prompt=0 if node.group is None else len(node.group.prompt),
                )
            )

    def _finish(self, root: Node) -> None:
        nodes = list(root.subtree())
        groups = {node.group for node in nodes if node.group is not None}
        across = Work(attended=sum(group.attended_across() for group in groups))
        self._rollouts[root.rollout.ordinal] = Rollout(
            key=root.rollout.key,
            result=root.value,
            calls=tuple(call for node in sorted(nodes, key=lambda n: n.path) for call in node.calls),
            sequential_tokens=root.clock,
            latency_ms=self._ms(root),
            work=sum((node.thread.work for node in nodes if node.thread is not None), across),
        )
        self.finished += 1
        for node in nodes:
            if node.thread is not None:
                del self._node_of[node.thread]

    def _tell(self, node: Node, happening: Happening) -> None:
        if self._observer is not None and node.thread is not None:
            self._observer(node.rollout.key, node.thread, happening)

    def _ms(self, node: Node) -> float:
        return (self._now() - node.rollout.started) * 1e3
