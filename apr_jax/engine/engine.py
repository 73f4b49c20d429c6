"""The engine: runs programs over threads, thousands at a time, on the lanes of a mesh.

One *visit*: the scheduler fills lanes and reserves pages, new tokens are prefilled page by page, the device decodes a
chunk for all lanes, and the programs whose Decode ended go on.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError, ModelConfig, RolloutConfig
from apr_jax.engine.constraints import Gate
from apr_jax.engine.pack_arrays import Packed, pack
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.policy_masks import gate_masks, held_lanes
from apr_jax.engine.programs import Programs
from apr_jax.engine.scheduler import PrefillChunk, Scheduler
from apr_jax.engine.steps import (
    COPIES_PER_CALL,
    PREFILL_BLOCK,
    SHARDED,
    DecodeLanes,
    Policy,
    PrefillLanes,
    SharedLanes,
    Steps,
    Written,
)
from apr_jax.engine.threads import MAX_STOP_TOKENS, Observer, Program, Progress, Rollout, RolloutKey, Thread
from apr_jax.model.decode_weights import layout_shardings, to_layout
from apr_jax.model.llama import logical_axes
from apr_jax.parallel.mesh import RULES, param_shardings, partition_spec


@dataclasses.dataclass
class EngineStats:
    """What one run did."""

    visits: int = 0
    decode_steps: int = 0  # of the longest shard, summed over visits
    lane_steps: int = 0  # decode_steps x lanes
    generated: int = 0  # tokens, those of cancelled threads included
    prefilled: int = 0  # tokens computed by prefill
    reused: int = 0  # tokens whose pages were shared instead
    prefill_calls: int = 0
    preemptions: int = 0  # times that a thread's pages were taken
    seconds: float = 0.0
    host_seconds: float = 0.0  # in which the device had nothing to do: from its results to the next step's launch
    page_places: int = 0  # token places in held pages, summed over each visit's beginning and end
    wasted_places: int = 0  # of them, without a token
    compilations: int = 0  # programs compiled during the run

    @property
    def lane_occupancy(self) -> float:
        """Share of lane-steps that wrote a token."""
        return self.generated / max(1, self.lane_steps)

    @property
    def host_share(self) -> float:
        """Share of the time in which the device waited for the host."""
        return self.host_seconds / max(self.seconds, 1e-9)

    @property
    def cache_waste(self) -> float:
        """Share of the held pages' places without a token."""
        return self.wasted_places / max(1, self.page_places)


class Engine:
    """Decodes programs with one model. Not thread-safe; one run at a time."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        mesh: Mesh,
        *,
        params: Any,
        banned_tokens: tuple[int, ...],
        gate: Gate | None = None,
        max_workers: int = 0,
        expects_groups: bool = True,
    ):
        """Allocates the cache and places the weights.

        Args:
            model: the model of `params`.
            rollout: lanes, pages and limits, over all data shards.
            mesh: axes "data", "fsdp" and "tensor"; lanes and pages are split over "data", heads over "tensor".
            params: the tree of `llama.init_params`.
            banned_tokens: ids that are never drawn (among them the vocabulary's padding).
            gate: lets programs decode under a grammar; None compiles nothing for it.
            max_workers: how many may share a cache (`Share`); 0: none.
            expects_groups: False: the step for those is compiled when a first group comes and not by `warm_up`, and no
                memory is planned for it.

        Raises:
            ConfigError: sizes that cannot work, or don't fit a device.
        """
        if any(not 0 <= token < model.vocab_size for token in banned_tokens):
            raise ConfigError(f"banned_tokens {banned_tokens} must lie in [0, model.vocab_size={model.vocab_size})")
        if len(set(banned_tokens)) == model.vocab_size:
            raise ConfigError(f"all {model.vocab_size} tokens are banned")
        plan = EnginePlan.of(model, rollout, mesh, max_workers, expects_groups)
        self.limits, self.memory = plan.limits, plan.memory
        self.stats = EngineStats()
        self.model = model
        self._max_steps, self._max_total_tokens = rollout.max_steps, rollout.max_total_tokens
        self._mesh = mesh
        self._idle_since: float | None = None  # when the device's last results came
        self._banned_mask = np.zeros((model.vocab_size,), bool)
        self._banned_mask[list(banned_tokens)] = True
        self._gate, self._expects_groups = gate, expects_groups and max_workers > 0
        self._gate_masks = None if gate is None else gate_masks(gate, model.vocab_size)
        self._scheduler = Scheduler(self.limits)
        layout = plan.weights
        self._steps = Steps(model, self.limits, mesh, layout, plan.decode)
        self._to_layout = jax.jit(
            lambda params: to_layout(params, model, layout), out_shardings=layout_shardings(mesh, model, layout)
        )
        self._pages, self._rows = jax.jit(plan.caches, out_shardings=plan.cache_sharding)()
        self._params = self._place(params)

    def set_params(self, params: Any) -> None:
        """New weights, a new policy: nothing that older weights computed is ever read again."""
        self._params = self._place(params)
        self._scheduler.new_policy()

    def warm_up(self) -> float:
        """Compiles all that runs will use. Returns the seconds it took."""
        start = time.perf_counter()
        policy, lanes, prefill = self._policy(1.0), self._decode_lanes()[0], self._prefill_lanes([])
        shared = self._shared_lanes()[0] if self._expects_groups else None
        self._steps.compile(self._pages, self._rows, self._params, lanes, policy, prefill, shared)
        self._copy([[] for _ in range(self.limits.num_shards)], force=True)
        self._pages = self._steps.prefill(self._pages, self._params, prefill)
        jax.device_get(self._decode(lanes, policy))
        if shared is not None:
            jax.device_get(self._decode_shared(shared, policy))
        return time.perf_counter() - start

    def run(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        *,
        seed: int,
        temperature: float,
        on_progress: Callable[[Progress], None] | None = None,
        observer: Observer | None = None,
    ) -> list[Rollout]:
        """Runs all programs to their end and returns their rollouts in the order given.

        A rollout's tokens depend on the weights, `seed`, `temperature`, its key and its program only. An exception
        inside a program propagates; the engine can be used again afterwards. `on_progress` is called after each visit,
        `observer` whenever something happens to a thread.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be >= 0 (0 is greedy)")
        begin = time.perf_counter()
        compiled, preempted, reused = (
            self._steps.num_compilations,
            self._scheduler.preemptions,
            self._scheduler.reused_tokens,
        )
        self.stats = EngineStats()
        self._idle_since = begin
        run = Programs(
            programs,
            self._scheduler,
            seed=seed,
            max_seq_len=self.model.max_seq_len,
            max_steps=self._max_steps,
            max_total_tokens=self._max_total_tokens,
            now=time.perf_counter,
            gate=self._gate,
            observer=observer,
        )
        policy = self._policy(temperature)
        try:
            while True:
                self._scheduler.admit(run.start_next)
                if not self._scheduler.num_running:
                    break
                self._visit(run, policy)
                if on_progress is not None:
                    elapsed = time.perf_counter() - begin
                    on_progress(Progress(run.finished, len(programs), self.stats.generated, elapsed))
        except BaseException:
            run.abandon()
            raise
        self.stats.seconds = time.perf_counter() - begin
        self.stats.compilations = self._steps.num_compilations - compiled
        self.stats.preemptions = self._scheduler.preemptions - preempted
        self.stats.reused = self._scheduler.reused_tokens - reused
        return run.results()

    def _visit(self, run: Programs, policy: Policy) -> None:
        stats = self.stats
        self._copy(self._scheduler.take_copies())
        while self._prefill_next():
            pass
        held = [self._scheduler.waste()]  # when the chunk's pages are reserved, and when its tokens are there
        lanes, placed = self._decode_lanes()
        shared, workers = self._shared_lanes() if self.limits.max_workers else (None, [])
        if placed or not workers:
            self._take(run, jax.device_get(self._decode(lanes, policy)), placed)
        if shared is not None and workers:
            self._take(run, jax.device_get(self._decode_shared(shared, policy)), workers)
        held.append(self._scheduler.waste())
        run.drain()
        stats.visits += 1
        stats.wasted_places += sum(waste for waste, _ in held)
        stats.page_places += sum(places for _, places in held)

    def _prefill_next(self) -> bool:
        """Launches the next prefill call; False where there is nothing to prefill."""
        try:
            chunks = [c for shard in range(self.limits.num_shards) for c in self._take_chunks(shard)]
            if chunks:
                prefill = self._prefill_lanes(chunks)
                self._launched()
                self._pages = self._steps.prefill(self._pages, self._params, prefill)
        except BaseException:
            self._scheduler.new_policy()  # what was taken counts as computed, and may be published
            raise
        self.stats.prefill_calls += bool(chunks)
        self.stats.prefilled += sum(chunk.count for chunk in chunks)
        return bool(chunks)

    def _take(self, run: Programs, written: Written, placed: Sequence[tuple[int, int, Thread]]) -> None:
        """Hands what a decode call wrote to the threads at `placed` (shard, lane)."""
        stats, self._idle_since = self.stats, time.perf_counter()
        counts = written.counts.tolist()
        tokens, logprobs = _by_lane(written.tokens), _by_lane(written.logprobs)
        shut_logprobs = None if written.shut_logprobs is None else _by_lane(written.shut_logprobs)
        for shard, lane, thread in placed:
            count = counts[shard][lane]
            stats.generated += count
            shut = () if shut_logprobs is None else shut_logprobs[shard][lane][:count]
            run.decoded(thread, tokens[shard][lane][:count], logprobs[shard][lane][:count], shut)
        steps = int(written.steps.max())
        stats.decode_steps += steps
        stats.lane_steps += steps * written.counts.size

    def _launched(self) -> None:
        """The device is about to get work: until now it may have waited for the host."""
        if self._idle_since is not None:
            self.stats.host_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None

    def _decode(self, lanes: Packed, policy: Policy) -> Written:
        self._launched()
        self._pages, self._rows, written = self._steps.decode(self._pages, self._rows, self._params, lanes, policy)
        return written

    def _decode_shared(self, shared: Packed, policy: Policy) -> Written:
        self._launched()
        self._pages, written = self._steps.decode_shared(self._pages, self._params, shared, policy)
        return written

    def _copy(self, copies: list[list[Any]], *, force: bool = False) -> None:
        """Makes the page copies in order; `force` calls the device even without any."""
        calls = max(-(-len(shard) // COPIES_PER_CALL) for shard in copies)
        for call in range(max(calls, int(force))):
            pairs = np.zeros((2, self.limits.num_shards, COPIES_PER_CALL), np.int32)
            for shard, todo in enumerate(copies):
                for index, copy in enumerate(todo[call * COPIES_PER_CALL : (call + 1) * COPIES_PER_CALL]):
                    pairs[:, shard, index] = copy.source, copy.target
            sources, targets = self._put(pairs[0]), self._put(pairs[1])
            self._launched()
            self._pages = self._steps.copy_pages(self._pages, sources, targets)

    def _decode_lanes(self) -> tuple[Packed, list[tuple[int, int, Thread]]]:
        """The arrays of the threads that can decode now, each on its own cache, and where each stands."""
        shape = (self.limits.num_shards, self.limits.lanes)
        placed = [
            (shard, thread.lane, thread)
            for shard in range(self.limits.num_shards)
            for thread in self._scheduler.running(shard)
            if thread.group is None and self._scheduler.can_decode(thread)
        ]
        lanes = self._lanes_of(shape, placed)
        held = None if self._gate is None else held_lanes(self._gate, shape, placed)
        packed: Packed = self._put(pack(dataclasses.replace(lanes, held=held)))
        return packed, placed

    def _shared_lanes(self) -> tuple[Packed, list[tuple[int, int, Thread]]]:
        """The arrays of the groups' workers, those that have stopped among them, and where those who go on stand."""
        limits = self.limits
        shape = (limits.num_shards, limits.max_groups * limits.max_workers)
        placed = [
            (shard, index * limits.max_workers + number, worker)
            for shard in range(limits.num_shards)
            for index, group in enumerate(self._scheduler.groups(shard))
            for number, worker in enumerate(group.workers)
        ]
        prompt = np.zeros(shape, np.int32)
        lanes = self._lanes_of(shape, placed)
        living = []
        for shard, lane, worker in placed:
            assert worker.group is not None
            prompt[shard, lane] = len(worker.group.prompt)
            if worker in worker.group.stopped:
                lanes.remaining[shard, lane] = 0
            else:
                living.append((shard, lane, worker))
        packed: Packed = self._put(pack(SharedLanes(lanes, prompt)))  # type: ignore[arg-type]
        return packed, living

    def _lanes_of(self, shape: tuple[int, int], placed: Sequence[tuple[int, int, Thread]]) -> DecodeLanes:
        """What decode needs of the threads at `placed` (shard, lane), as arrays (NumPy) of `shape` shards x lanes."""
        token, length, remaining, generated = (np.zeros(shape, np.int32) for _ in range(4))
        stop_tokens = np.full((*shape, MAX_STOP_TOKENS), -1, np.int32)
        key_data = np.zeros((*shape, 2), np.uint32)
        tables = np.zeros((*shape, self._steps.layout.pages_per_row), np.int32)
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

    def _take_chunks(self, shard: int) -> list[PrefillChunk]:
        """A shard's part of the next prefill call.

        Where lanes may be neighbouring positions of one row, a call takes chunk after chunk until it is full.
        """
        scheduler, lanes = self._scheduler, self._num_prefill_lanes
        taken: list[PrefillChunk] = []
        while True:
            chunks = scheduler.prefill_chunks(shard)
            for chunk in chunks:
                needed = -(-chunk.count // self._steps.prefill_width)
                if needed > lanes:
                    return taken
                lanes -= needed
                scheduler.prefilled(chunk)
                taken.append(chunk)
            if not chunks or not self._steps.prefills_in_place:
                return taken

    @property
    def _num_prefill_lanes(self) -> int:
        """Lanes of a prefill call on one shard."""
        if not self._steps.prefills_in_place:
            return self.limits.prefill_lanes
        return -(-self.limits.prefill_lanes * self.limits.page_size // PREFILL_BLOCK) * PREFILL_BLOCK

    def _prefill_lanes(self, chunks: Sequence[PrefillChunk]) -> Packed:
        limits, width = self.limits, self._steps.prefill_width
        shape = (limits.num_shards, self._num_prefill_lanes)
        tokens = np.zeros((*shape, width), np.int32)
        start, count = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        tables = np.zeros((*shape, self._steps.layout.pages_per_row), np.int32)
        used = [0] * limits.num_shards
        for chunk in chunks:
            thread, shard, end = chunk.thread, chunk.thread.shard, chunk.start + chunk.count
            starts = range(chunk.start, end, width)
            first, used[shard] = used[shard], used[shard] + len(starts)
            start[shard, first : used[shard]] = starts
            count[shard, first : used[shard]] = [min(width, end - start) for start in starts]
            tokens[shard, first : used[shard]].reshape(-1)[: chunk.count] = thread.tokens[chunk.start : end]
            self._fill_table(tables[shard, first : used[shard]], thread)
        packed: Packed = self._put(pack(PrefillLanes(tokens, start, count, tables)))  # type: ignore[arg-type]
        return packed

    def _fill_table(self, rows: np.ndarray, thread: Thread) -> None:
        assert thread.table is not None
        pages = self._scheduler.allocators[thread.shard].pages(thread.table)
        rows[..., : len(pages)] = pages

    def _policy(self, temperature: float) -> Policy:
        replicated = NamedSharding(self._mesh, partition_spec())
        policy = Policy(np.float32(temperature), self._banned_mask, self._gate_masks)  # type: ignore[arg-type]
        return jax.device_put(policy, replicated)

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, SHARDED))

    def _place(self, params: Any) -> Any:
        """The weights in decode's layout, made on the devices; those of other devices are brought over first."""
        devices = set(self._mesh.devices.flat)
        if any(set(leaf.devices()) != devices for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)):
            rules = dataclasses.replace(RULES, embed=None)
            params = jax.device_put(params, param_shardings(self._mesh, params, logical_axes(params), rules))
        return self._to_layout(params)


def _by_lane(written: Any) -> list[list[list[Any]]]:
    """An array `[shards, steps, L]` as lists of lists, `[shards][L][steps]`: one call, where lanes' slices are many."""
    by_lane: list[list[list[Any]]] = np.swapaxes(written, 1, 2).tolist()
    return by_lane
