"""Drives programs: turns their requests into work for the scheduler and keeps the clock. No JAX.

The clock counts sequential tokens: a child's starts at its parent's at the spawn, decoding n tokens adds n, and a
join sets the parent's to the latest of its own and its children's.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

from apr_jax.engine.cancellation import Cancellation
from apr_jax.engine.constraints import Constraint, Gate
from apr_jax.engine.groups import Group, row_limit
from apr_jax.engine.recorder import Recorder
from apr_jax.engine.rollout_tree import Node, RolloutState
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.stop_strings import StringWatch
from apr_jax.engine.threads import (
    MAX_STOP_TOKENS,
    Append,
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


class Driver:
    """The driver of all programs of one run."""

    def __init__(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        scheduler: Scheduler,
        *,
        seed: int,
        max_steps: int,
        max_total_tokens: int,
        now: Callable[[], float],
        gate: Gate | None = None,
        observer: Observer | None = None,
    ):
        """Limit a thread's tokens by `max_steps` and a rollout's by `max_total_tokens`; `now` is a clock in seconds."""
        self._waiting = collections.deque(enumerate(programs))
        self._scheduler = scheduler
        self._seed, self._gate = seed, gate
        self._max_steps, self._max_total_tokens = max_steps, max_total_tokens
        self._recorder = Recorder(len(programs), now, observer)
        self._cancellation = Cancellation(scheduler, self._recorder, self._resume)
        self._queue: collections.deque[tuple[Node, Any]] = collections.deque()
        self._node_of: dict[Thread, Node] = {}

    @property
    def finished(self) -> int:
        """Rollouts that have ended."""
        return self._recorder.finished

    def results(self) -> list[Rollout]:
        """Return all rollouts, in the order of their programs. Raises AssertionError while one is unfinished."""
        return self._recorder.results()

    def start_next(self) -> bool:
        """Start the next root program and run it until it waits. False: all have been started."""
        if not self._waiting:
            return False
        ordinal, (key, program) = self._waiting.popleft()
        rollout = RolloutState(ordinal, key, self._recorder.now())
        total = self._max_total_tokens
        self._queue.append((Node(program, (), rollout, parent=None, clock=0, left=total, granted=total), None))
        self.drain()
        return True

    def decoded(
        self,
        thread: Thread,
        tokens: list[int],
        logprobs: list[float],
        shut_logprobs: Sequence[float] = (),
        kept: Sequence[int] = (),
    ) -> None:
        """Take the tokens that the device drew for a thread; queue its program if its Decode is over (see `drain`).

        `shut_logprobs`, the log-probabilities without the gate token, are read where the thread has a grammar. `kept`
        is of a truncated policy (`Call.kept`). A thread that asked for a Prefill has a lane to write nothing.
        """
        node = self._node_of[thread]
        if node.call is None:
            assert not tokens
            self._scheduler.leave_lane(thread)
            self._queue.append((node, None))
            return
        drawn, stop = len(tokens), None
        if thread.constraint is not None:
            tokens, logprobs = thread.constraint.take(thread.tokens, tokens, logprobs, shut_logprobs)
            thread.rejected += drawn - len(tokens)
        elif thread.watch is not None and (found := thread.watch.take(thread.tokens, tokens)) is not None:
            tokens, logprobs, kept = tokens[: found.count], logprobs[: found.count], kept[: found.count]
            stop = Stop(StopReason.STRING, None, found.string, found.excess)
        self._scheduler.cache.decoded(thread, drawn, len(tokens))
        thread.tokens.extend(tokens)
        thread.generated += len(tokens)
        node.clock += len(tokens)
        node.left -= len(tokens)
        self._recorder.wrote(node, tokens, logprobs, kept)
        if stop is None and tokens:
            stop = self._stop(thread)
        if node.cutoff is not None and (node.clock > node.cutoff or (stop is None and node.clock == node.cutoff)):
            self._cancellation.park(node)
        elif stop is not None:
            self._scheduler.leave_lane(thread)
            self._recorder.close_call(node, stop)
            self._queue.append((node, stop))

    def drain(self) -> None:
        """Run every program that can go on, until all wait for the device or for children."""
        while self._queue:
            node, value = self._queue.popleft()
            if not node.cancelled:
                self._advance(node, value)

    def check(self) -> None:
        """Raise AssertionError unless programs, threads, calls and budgets agree; between visits."""
        for thread, node in self._node_of.items():
            assert node.thread is thread
            assert 0 <= node.left <= node.granted, "a program has more tokens than it was granted"
            if node.call is not None:
                assert node.clock == node.call.clock_start + len(node.call.tokens), "the clock lost tokens"
                assert thread.tokens[len(node.call.context) :] == node.call.tokens, "a call is not what was written"
            if node.group is None:
                parked = node.call is not None and node.cutoff is not None and node.clock >= node.cutoff
                assert not parked or thread.turn.status is Status.DONE, "a thread runs beyond its cutoff"
                assert not node.ended or thread.turn.status is Status.DONE, "a thread outlives its program"
                assert (thread.turn.status is Status.WAITING_ON_CHILDREN) == (node.join is not None)

    def close(self) -> None:
        """Close every generator, after an exception."""
        for node in self._node_of.values():
            node.generator.close()

    def _advance(self, node: Node, value: Any) -> None:
        while True:
            try:
                request = node.generator.send(value)
            except StopIteration as stop:
                self._end(node, stop.value)
                return
            if isinstance(request, Decode):
                value = self._decode(node, request)
                if value is None:
                    return
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
        """Answer a request that needs nobody else."""
        if node.group is not None and not isinstance(request, Open):
            raise ValueError(f"worker {node.path} asked for {request!r}; a worker opens its thread and decodes once")
        match request:
            case Open():
                return self._open(node, request)
            case Truncate(thread, length):
                self._own(node, thread)
                if not 1 <= length <= len(thread.tokens):
                    raise ValueError(f"cannot truncate a thread of {len(thread.tokens)} tokens to {length}")
                del thread.tokens[length:]
                self._scheduler.cache.truncate(thread, length)
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
        parent, group, longest = request.fork_of, node.group, self._scheduler.limits.max_seq_len
        tokens = [*(parent.tokens if parent is not None else ()), *request.tokens]
        if not tokens:
            raise ValueError(f"program {node.path} opened a thread without tokens")
        max_length = min(longest, request.max_length or longest)
        if group is not None:
            if parent is not None:
                raise ValueError(f"worker {node.path} opened a fork; its group's prompt stands before its tokens")
            tokens = [*group.prompt, *tokens]
            max_length = min(max_length, row_limit(longest, len(group.prompt), group.size, node.path[-1]))
        key = thread_key(self._seed, node.rollout.key, node.path)
        node.thread = Thread(node.path, tokens, node.rollout.ordinal, key, max_length, group)
        self._node_of[node.thread] = node
        if parent is not None:
            self._scheduler.cache.fork(parent, node.thread)
        self._recorder.tell(node, Happening.OPENED)
        return node.thread

    def _prefill(self, node: Node, thread: Thread) -> bool:
        """Hand the thread to the scheduler, with nothing to write. False: there is nothing to be computed for."""
        self._own(node, thread)
        if len(thread.tokens) >= thread.max_length:
            return False
        thread.stop_tokens, thread.constraint = (), None
        thread.max_generated = thread.generated
        self._scheduler.submit(thread)
        return True

    def _decode(self, node: Node, request: Decode) -> Stop | None:
        """Hand the thread to the scheduler, or return the Stop of one that can't decode."""
        thread = request.thread
        self._own(node, thread)
        grammar, strings = request.grammar, request.stop_strings
        if node.group is not None and (node.decided or grammar is not None or strings is not None):
            raise ValueError(f"worker {node.path} decodes once, without a grammar and without stop strings")
        if grammar is not None and strings is not None:
            raise ValueError("a Decode has a grammar or stop strings, and not both")
        if len(request.stop_tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"{len(request.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} can be matched")
        thread.stop_tokens = tuple(request.stop_tokens)
        budget = node.left if request.max_tokens is None else min(node.left, request.max_tokens)
        thread.max_generated = min(self._max_steps, thread.generated + budget)
        thread.watch = None if strings is None else StringWatch(strings)
        thread.constraint = None
        if grammar is not None:
            if self._gate is None:
                raise ValueError("a Decode with a grammar needs an engine with a gate")
            thread.constraint = Constraint(self._gate, grammar)
        limit = self._limit(thread)
        if limit is not None:
            self._decide(node, None)
            return Stop(limit, None)
        self._recorder.open_call(node)
        if node.cutoff is not None and node.clock >= node.cutoff:
            self._decide(node, None)
            self._cancellation.park(node)
        elif node.group is not None:
            self._decide(node, thread)
        else:
            self._scheduler.submit(thread)
        return None

    def _decide(self, node: Node, worker: Thread | None) -> None:
        """Note that a worker asked for its Decode (None: it won't decode): the last one to do so starts its group."""
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
            self._scheduler.wait_for_children(node.thread)
        self._recorder.tell(node, Happening.WAITS)
        for child in node.joined:
            if child.ended:
                child.succeeded = request.success is not None and request.success(child.value)
        self._cancellation.settle(node)
        self._cancellation.settle_above(node)

    def _resume(self, node: Node) -> None:
        """Let a program go on whose joined children have all ended."""
        children = node.joined
        node.clock = max([node.clock, *(child.clock for child in children)])
        node.left += sum(child.granted - child.written() for child in children)
        node.join = None
        if node.thread is not None:
            self._scheduler.resume(node.thread)
        self._recorder.tell(node, Happening.RESUMED)
        self._queue.append((node, [None if child.cancelled else child.value for child in children]))

    def _end(self, node: Node, value: Any) -> None:
        if node.unjoined:
            raise RuntimeError(f"program {node.path} returned without joining {len(node.unjoined)} of its spawns")
        node.ended, node.value = True, value
        self._decide(node, None)
        self._recorder.tell(node, Happening.ENDED)
        if node.thread is not None:
            self._scheduler.release(node.thread)
        parent = node.parent
        if parent is None:
            self._recorder.finish(node)
            for each in node.subtree():
                if each.thread is not None:
                    del self._node_of[each.thread]
        elif parent.join is not None and node.path[-2] == parent.join.handle.ordinal:
            node.succeeded = parent.join.success is not None and parent.join.success(value)
            self._cancellation.settle(parent)
            self._cancellation.settle_above(parent)
