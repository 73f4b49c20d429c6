"""The arrays by which the host tells the device about each lane, and the device reports back."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from apr_jax.engine.constraints import FREE, Gate, words
from apr_jax.engine.policy_masks import LaneConstraints, LaneRegisters
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.thread_cache import PrefillChunk
from apr_jax.engine.threads import MAX_STOP_TOKENS, Thread

Place = tuple[int, int, Thread]  # shard, lane, and the thread that stands there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeLanes:
    """The host's arrays for the lanes of a decode chunk, [shards, L, ...]."""

    token: jax.Array  # int32: the thread's last token, not yet computed
    length: jax.Array  # int32: tokens before it = its position
    remaining: jax.Array  # int32: tokens that the thread may still write; 0 = the lane is idle
    stop_tokens: jax.Array  # int32 [.., MAX_STOP_TOKENS], filled with -1
    key_data: jax.Array  # uint32 [.., 2]
    generated: jax.Array  # int32: tokens that the thread has generated before
    tables: jax.Array  # int32 [.., pages of a row]
    constraints: LaneConstraints | None = None  # None: the engine has no gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupLanes:
    """The same of lanes that are workers on shared caches: lane `a * max_workers + w` is worker w of group a."""

    lanes: DecodeLanes
    prompt: jax.Array  # int32: the first positions of the row, which the group has in common


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillLanes:
    """The host's arrays for a prefill call, [shards, L, ...]; W is the strategy's `width` (`prefill.py`)."""

    tokens: jax.Array  # int32 [.., W]: neighbouring tokens of one thread, from the first place or the aligned one on
    start: jax.Array  # int32: position of the first
    count: jax.Array  # int32: how many of them are real; 0 = the lane is idle
    tables: jax.Array  # int32 [.., pages of a row]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """The tokens that a decode chunk wrote, [shards, ...]."""

    tokens: jax.Array  # int32 [steps, L]
    logprobs: jax.Array  # float32 [steps, L]
    shut_logprobs: jax.Array | None  # float32 [steps, L]: the same without the gate token
    kept: jax.Array | None  # int32 [steps, L]: the tokens that a truncated policy left to draw from
    counts: jax.Array  # int32 [L]: the lane's tokens are the first `count` of its column
    steps: jax.Array  # int32: steps that the shard ran


@dataclasses.dataclass(frozen=True)
class LaneFiller:
    """A writer of the lanes' arrays (NumPy), from the scheduler's state."""

    scheduler: Scheduler
    pages_per_row: int
    gate: Gate | None

    def decode(self, half: int = 0) -> tuple[DecodeLanes, list[Place]]:
        """Return the lanes of a half's threads that can decode now, each on its own cache, and where each stands."""
        limits, scheduler = self.scheduler.limits, self.scheduler
        shape = (limits.num_shards, limits.lanes_in_turn)
        placed = [
            (shard, thread.turn.lane % limits.lanes_in_turn, thread)
            for shard in range(limits.num_shards)
            for thread in scheduler.running(shard, half)
            if thread.group is None and scheduler.can_decode(thread)
        ]
        lanes = self._decode_lanes(shape, placed)
        constraints = None if self.gate is None else _lane_constraints(self.gate, shape, placed)
        return dataclasses.replace(lanes, constraints=constraints), placed

    def groups(self) -> tuple[GroupLanes, list[Place]]:
        """Return the lanes of all groups' workers, and where those stand that have not stopped."""
        limits = self.scheduler.limits
        shape = (limits.num_shards, limits.max_groups * limits.max_workers)
        placed = [
            (shard, index * limits.max_workers + number, worker)
            for shard in range(limits.num_shards)
            for index, group in enumerate(self.scheduler.groups(shard))
            for number, worker in enumerate(group.workers)
        ]
        prompt = np.zeros(shape, np.int32)
        lanes = self._decode_lanes(shape, placed)
        living = []
        for shard, lane, worker in placed:
            assert worker.group is not None
            prompt[shard, lane] = len(worker.group.prompt)
            if worker in worker.group.stopped:
                lanes.remaining[shard, lane] = 0
            else:
                living.append((shard, lane, worker))
        return GroupLanes(lanes, prompt), living  # type: ignore[arg-type]

    def prefill(self, chunks: Sequence[PrefillChunk], num_lanes: int, width: int, aligned: bool) -> PrefillLanes:
        """Return the lanes of a prefill call of `num_lanes` a shard; see `lane_spans` for the rest."""
        limits = self.scheduler.limits
        shape = (limits.num_shards, num_lanes)
        tokens = np.zeros((*shape, width), np.int32)
        start, count = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        tables = np.zeros((*shape, self.pages_per_row), np.int32)
        used = [0] * limits.num_shards
        for chunk in chunks:
            thread, shard = chunk.thread, chunk.thread.cached.shard
            spans, place = lane_spans(chunk, width, aligned), chunk.start % width if aligned else 0
            first, used[shard] = used[shard], used[shard] + len(spans)
            start[shard, first : used[shard]] = [span.start for span in spans]
            count[shard, first : used[shard]] = [len(span) for span in spans]
            places = tokens[shard, first : used[shard]].reshape(-1)
            places[place : place + chunk.count] = thread.tokens[chunk.start : chunk.start + chunk.count]
            self._fill_table(tables[shard, first : used[shard]], thread)
        return PrefillLanes(tokens, start, count, tables)  # type: ignore[arg-type]

    def _decode_lanes(self, shape: tuple[int, int], placed: Sequence[Place]) -> DecodeLanes:
        """Return what decode needs of the threads at `placed`, as arrays of `shape` shards x lanes."""
        token, length, remaining, generated = (np.zeros(shape, np.int32) for _ in range(4))
        stop_tokens = np.full((*shape, MAX_STOP_TOKENS), -1, np.int32)
        key_data = np.zeros((*shape, 2), np.uint32)
        tables = np.zeros((*shape, self.pages_per_row), np.int32)
        for shard, lane, thread in placed:
            place = (shard, lane)
            token[place] = thread.tokens[-1]
            length[place] = len(thread.tokens) - 1
            remaining[place] = min(thread.max_generated - thread.generated, thread.max_length - len(thread.tokens))
            generated[place] = thread.generated + thread.rejected
            stop_tokens[place][: len(thread.stop_tokens)] = thread.stop_tokens
            key_data[place] = thread.key
            self._fill_table(tables[place], thread)
        return DecodeLanes(token, length, remaining, stop_tokens, key_data, generated, tables)  # type: ignore[arg-type]

    def _fill_table(self, rows: np.ndarray, thread: Thread) -> None:
        pages = self.scheduler.cache.pages(thread)
        rows[..., : len(pages)] = pages


def lane_spans(chunk: PrefillChunk, width: int, aligned: bool) -> list[range]:
    """Return the positions of a chunk that each of its lanes computes, up to `width`.

    Args:
        aligned: lanes end at multiples of `width`; otherwise the first one begins at its first place.
    """
    start, end = chunk.start, chunk.start + chunk.count
    base = start // width * width if aligned else start
    return [range(max(start, at), min(end, at + width)) for at in range(base, end, width)]


def _lane_constraints(gate: Gate, shape: Sequence[int], placed: Sequence[Place]) -> LaneConstraints:
    edges = np.zeros((*shape, *gate.table_shape), np.int32)
    gate_from = np.full(shape, -1, np.int32)
    state, count = np.full(shape, FREE, np.int32), np.zeros(shape, np.int32)
    used = np.zeros((*shape, gate.num_words), np.int32)
    for shard, lane, thread in placed:
        place, constraint = (shard, lane), thread.constraint
        if constraint is None:
            continue
        gate_from[place] = constraint.gate_from
        if constraint.automaton is not None:
            registers = constraint.registers
            edges[place] = constraint.automaton.table()
            state[place], count[place] = registers.state, registers.count
            used[place] = words(registers.used, gate.num_words)
    return LaneConstraints(edges, gate_from, LaneRegisters(state, used, count))  # type: ignore[arg-type]
