"""The engine's side of the generator protocol, played from prepared completions instead of a model.

It keeps the accounts as simply as they can be kept: no schedule, no pages, nothing shared but by forks, nothing
computed twice. `tests/reasoning/accounting.py` holds it against the engine's own host and against counts by hand.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apr_jax.engine.groups import Group
from apr_jax.engine.stop_strings import StopStrings, StringWatch
from apr_jax.engine.threads import (
    Append,
    Call,
    Decode,
    Join,
    Open,
    Path,
    Prefill,
    Program,
    Rollout,
    RolloutKey,
    Share,
    Spawn,
    SpawnHandle,
    Stop,
    StopReason,
    Thread,
    Truncate,
)
from apr_jax.engine.work_counters import Work
from tests.reasoning.fixtures import MODEL

Complete = Callable[[Path, list[int]], Sequence[int]]  # what a thread with these tokens writes, stop token included


class ScriptedEngine:
    """Runs programs one after the other; children in spawn order. Clocks as the engine counts them."""

    def __init__(
        self,
        complete: Complete,
        *,
        max_seq_len: int = 100_000,
        max_steps: int = 100_000,
        max_total_tokens: int = 1_000_000_000,
        logprob: Callable[[Path], float] = lambda path: 0.0,
    ) -> None:
        """`logprob` is that of each token which the thread of a path writes."""
        self._complete, self._max_seq_len, self._max_steps = complete, max_seq_len, max_steps
        self._max_total_tokens, self._logprob = max_total_tokens, logprob
        self.model = MODEL

    def run(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        *,
        seed: int = 0,
        temperature: float = 0.0,
        on_progress: Callable[..., None] | None = None,
    ) -> list[Rollout]:
        del seed, temperature, on_progress
        rollouts = []
        for key, program in programs:
            calls: list[Call] = []
            self._threads: list[Thread] = []
            result, clock, _ = self._drive(program, (), 0, calls, self._max_total_tokens)
            calls.sort(key=lambda call: call.path)
            work = sum((thread.cached.work for thread in self._threads), Work())
            rollouts.append(Rollout(key, result, tuple(calls), clock, latency_ms=clock / 10, work=work))
        return rollouts

    def _drive(
        self, program: Program, path: Path, clock: int, calls: list[Call], left: int, prompt: Sequence[int] = ()
    ) -> tuple[Any, int, int]:
        """The program's value, its clock at the end, and what is left of the tokens it was given.

        A worker on a shared cache has its group's `prompt` before its own tokens.
        """
        thread = Thread(path=path, tokens=[], rollout=0, key=(0, 0))
        thread.group = Group(tuple(prompt), 0, 0) if prompt else None
        self._threads.append(thread)
        spawned: list[list[tuple[Any, int, int]]] = []
        reply: Any = None
        while True:
            try:
                request = program.send(reply)
            except StopIteration as end:
                return end.value, clock, left
            match request:
                case Open(tokens, fork_of, max_length):
                    thread.tokens = [*prompt, *(fork_of.tokens if fork_of else ()), *tokens]
                    thread.cached.computed = fork_of.cached.computed if fork_of else 0
                    thread.max_length = min(self._max_seq_len, max_length or sys.maxsize)
                    reply = thread
                case Prefill(asked):
                    assert asked is thread
                    if len(thread.tokens) < thread.max_length:
                        self._prefill(thread)
                    reply = None
                case Decode(asked, stop_tokens, _, max_tokens, stop_strings):
                    assert asked is thread
                    budget = left if max_tokens is None else min(left, max_tokens)
                    thread.max_generated = min(self._max_steps, thread.generated + budget)
                    left += thread.generated
                    reply, clock = self._decode(thread, stop_tokens, stop_strings, clock, calls)
                    left -= thread.generated
                case Truncate(_, length):
                    assert 1 <= length <= len(thread.tokens)
                    del thread.tokens[length:]
                    thread.cached.computed = min(thread.cached.computed, length - 1)
                    reply = None
                case Append(_, tokens):
                    thread.tokens += tokens
                    reply = None
                case Spawn(programs) | Share(_, programs):
                    given = request.prompt if isinstance(request, Share) else ()
                    ordinal, share = len(spawned), left // (len(programs) + 1)
                    left -= share * len(programs)
                    ended = [
                        self._drive(p, (*path, ordinal, i), clock, calls, share, given) for i, p in enumerate(programs)
                    ]
                    if isinstance(request, Share):
                        self._count_across(len(given), (*path, ordinal))
                    spawned.append(ended)
                    reply = SpawnHandle(ordinal, len(programs))
                case Join(handle, success):
                    reply, clock = self._join([child[:2] for child in spawned[handle.ordinal]], success, clock)
                    left += sum(child[2] for child in spawned[handle.ordinal])

    def _count_across(self, prompt: int, path: Path) -> None:
        """Adds what the workers of a group saw of each other, draw by draw, to their work."""
        workers = [thread for thread in self._threads if thread.path[:-1] == path and thread.generated]
        headers = {worker: len(worker.tokens) - worker.generated - prompt for worker in workers}
        for worker in workers:
            for time in range(worker.generated):
                for other in workers:
                    if other is not worker:
                        seen = min(headers[other] + time, headers[other] + other.generated - 1)
                        worker.cached.work += Work(attended=seen)

    def _join(self, ended: list[tuple[Any, int]], success: Any, clock: int) -> tuple[list[Any], int]:
        """Values in spawn order. With `success`, what ends after the first success is None (calls stay whole)."""
        succeeded = [end for value, end in ended if success is not None and success(value)]
        until = min(succeeded, default=max((end for _, end in ended), default=clock))
        return [value if end <= until else None for value, end in ended], max(clock, until)

    def _decode(
        self,
        thread: Thread,
        stop_tokens: tuple[int, ...],
        stop_strings: StopStrings | None,
        clock: int,
        calls: list[Call],
    ) -> tuple[Stop, int]:
        wanted = list(self._complete(thread.path, list(thread.tokens)))
        found = StringWatch(stop_strings).take(thread.tokens, wanted) if stop_strings else None
        wanted = wanted[: found.count] if found else wanted
        assert found or wanted[-1] in stop_tokens, "a script ends in a stop token or in a stop string"
        room = min(thread.max_length - len(thread.tokens), thread.max_generated - thread.generated)
        written = wanted[: max(0, room)]
        if written == wanted and found:
            stop = Stop(StopReason.STRING, None, found.string, found.excess)
        elif written == wanted:
            stop = Stop(StopReason.TOKEN, wanted[-1])
        elif len(thread.tokens) + len(written) >= thread.max_length:
            stop = Stop(StopReason.LENGTH, None)
        elif thread.generated + len(written) >= self._max_steps:
            stop = Stop(StopReason.MAX_STEPS, None)
        else:
            stop = Stop(StopReason.BUDGET, None)
        context, tokens = np.array(thread.tokens, np.int32), np.array(written, np.int32)
        end = clock + len(written)
        if written:
            self._prefill(thread)
            thread.cached.work = thread.cached.work.with_decode(thread.cached.computed, len(written))
            thread.cached.computed += len(written)
            thread.logprob += len(written) * self._logprob(thread.path)
            logprobs = np.full(len(written), self._logprob(thread.path), np.float32)
            shared = len(thread.group.prompt) if thread.group else 0
            call = Call(thread.path, context, tokens, logprobs, stop, clock, clock, end, group_prompt=shared)
            calls.append(call)
        thread.tokens += written
        thread.generated += len(written)
        return stop, end

    def _prefill(self, thread: Thread) -> None:
        missing = len(thread.tokens) - 1 - thread.cached.computed
        thread.cached.work = thread.cached.work.with_prefill(thread.cached.computed, missing)
        thread.cached.computed += missing
