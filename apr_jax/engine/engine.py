"""The engine: runs programs over threads, thousands at a time, on the lanes of a mesh.

One *visit*: the scheduler fills lanes and reserves pages, new tokens are prefilled page by page, the device decodes a
chunk for all lanes, and the programs whose Decode ended go on. With two halves (`Limits.halves`) a visit is of one of
them: when it has been sent to the device, the host waits for the other half's tokens and deals with them meanwhile.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError, EngineConfig, ModelConfig, RolloutConfig
from apr_jax.engine.constraints import Gate
from apr_jax.engine.driver import Driver
from apr_jax.engine.lanes import LaneFiller, Place, Written
from apr_jax.engine.pack_arrays import PackedArrays, pack_arrays
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.policy_masks import gate_masks
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.sharded import SHARDED, ShardedStep
from apr_jax.engine.steps import COPIES_PER_CALL, Sampling, Steps
from apr_jax.engine.thread_cache import PrefillChunk
from apr_jax.engine.threads import Observer, Program, Progress, Rollout, RolloutKey
from apr_jax.model.truncation import truncation_of
from apr_jax.parallel.device_memory import bytes_on
from apr_jax.parallel.mesh import partition_spec

_MOST_TEMPERATURE = 1e30


@dataclasses.dataclass
class EngineStats:
    """Counts and times of one run."""

    visits: int = 0
    decode_steps: int = 0  # of the longest shard, summed over visits
    lane_steps: int = 0  # decode_steps x lanes that decode together
    generated: int = 0  # tokens, those of cancelled threads included
    prefilled: int = 0  # tokens computed by prefill
    reused: int = 0  # tokens whose pages were shared instead
    prefill_calls: int = 0
    preemptions: int = 0  # times that a thread's pages were taken
    seconds: float = 0.0
    # In which the device had nothing to do: from its results to the next step's launch. Of two halves, those of the
    # second count as come with those of the first where they are there at the launch.
    host_seconds: float = 0.0
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
    """An engine that decodes programs with one model. Not thread-safe; one run at a time."""

    def __init__(
        self,
        model: ModelConfig,
        sizes: EngineConfig,
        rollout: RolloutConfig,
        mesh: Mesh,
        *,
        params: Any,
        banned_tokens: tuple[int, ...],
        gate: Gate | None = None,
        max_workers: int = 0,
        expects_groups: bool = True,
    ):
        """Allocate the cache and place the weights.

        Args:
            model: the model of `params`.
            sizes: lanes and pages, of each data shard; -1: as the memory that `params` leave allows.
            rollout: what limits a rollout, and what is cut off of its policy.
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
        plan = EnginePlan.of(model, sizes, mesh, max_workers, expects_groups, beside=bytes_on(mesh, params))
        self.limits, self.memory = plan.limits, plan.memory
        self.stats = EngineStats()
        self.model = model
        self._truncation = truncation_of(rollout)
        self._max_steps, self._max_total_tokens = rollout.max_steps, rollout.max_total_tokens
        self._mesh = mesh
        self._idle_since: float | None = None  # when the device's last results came
        self._in_flight: list[list[tuple[Written, list[Place]]]] = []  # of each half: what will be written, for whom
        self._banned_mask = np.zeros((model.vocab_size,), bool)
        self._banned_mask[list(banned_tokens)] = True
        self._gate, self._expects_groups = gate, expects_groups and max_workers > 0
        self._gate_masks = None if gate is None else gate_masks(gate, model.vocab_size)
        self._steps = Steps(self.limits, mesh, plan.weights, plan.kernels)
        self._make_pages = jax.jit(plan.pages, out_shardings=plan.cache_sharding)
        self._weights = plan.weights
        self._params: Any = None
        self._params = self._place(params)
        self._pages: Any = None
        self._unfinished = True  # a run, or an attempt to start anew
        self._start_anew()

    def set_params(self, params: Any) -> None:
        """Take new weights in the place of the old: nothing that those computed is ever read again.

        An interrupt on the way leaves an engine without weights, which takes them again and runs nothing before.
        """
        self._scheduler.cache.new_policy()
        self._params = self._place(params)

    def warm_up(self) -> float:
        """Compile all that runs will use. Returns the seconds it took."""
        start = time.perf_counter()
        with self._anew_after_errors():
            self._warm_up()
        return time.perf_counter() - start

    def _warm_up(self) -> None:
        sampling, lanes = self._sampling(1.0), self._pack(self._filler.decode()[0])
        prefill = self._prefill_lanes([])
        groups = self._pack(self._filler.groups()[0]) if self._expects_groups else None
        self._steps.compile(self._pages, self._params, lanes, sampling, prefill, groups)
        self._copy([[] for _ in range(self.limits.num_shards)], force=True)
        self._pages = self._steps.prefill(self._pages, self._params, prefill)
        jax.device_get(self._decode(self._steps.decode, lanes, sampling))
        if groups is not None:
            jax.device_get(self._decode(self._steps.decode_groups, groups, sampling))

    def run(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        *,
        seed: int,
        temperature: float,
        on_progress: Callable[[Progress], None] | None = None,
        observer: Observer | None = None,
    ) -> list[Rollout]:
        """Run all programs to their end and return their rollouts in the order given.

        A rollout's tokens depend on the weights, `seed`, `temperature`, its key and its program only. After any
        exception, an interrupt included, the engine can be used again. `on_progress` is called after each visit,
        `observer` whenever something happens to a thread.
        """
        if not 0 <= temperature <= _MOST_TEMPERATURE:
            raise ValueError(
                f"temperature={temperature} must be a number >= 0 (0 is greedy), at most {_MOST_TEMPERATURE}"
            )
        if self._params is None:
            raise RuntimeError("the engine has no weights, for new ones were interrupted on their way; set them again")
        with self._anew_after_errors():
            begin, compiled = time.perf_counter(), self._steps.num_compilations
            preempted, reused = self._scheduler.preemptions, self._scheduler.cache.reused_tokens
            self.stats, self._idle_since = EngineStats(), begin
            self._in_flight = [[] for _ in range(self.limits.halves)]
            driver = Driver(
                programs,
                self._scheduler,
                seed=seed,
                max_steps=self._max_steps,
                max_total_tokens=self._max_total_tokens,
                now=time.perf_counter,
                gate=self._gate,
                observer=observer,
            )
            sampling = self._sampling(temperature)
            with contextlib.closing(driver):
                for half in itertools.cycle(range(self.limits.halves)):
                    self._scheduler.admit(driver.start_next, half)
                    if half == 0 and not self._scheduler.num_running:
                        break
                    self._in_flight[half] = self._launch(half, sampling)
                    if self._land(driver, (half + 1) % self.limits.halves) and on_progress is not None:
                        elapsed = time.perf_counter() - begin
                        on_progress(Progress(driver.finished, len(programs), self.stats.generated, elapsed))
            self.stats.seconds = time.perf_counter() - begin
            self.stats.compilations = self._steps.num_compilations - compiled
            self.stats.preemptions = self._scheduler.preemptions - preempted
            self.stats.reused = self._scheduler.cache.reused_tokens - reused
            return driver.results()

    @contextlib.contextmanager
    def _anew_after_errors(self) -> Iterator[None]:
        """Start anew after any exception: it may have come between a donating call and its result.

        An interrupt may come at any point, here as well; then the next run starts anew.
        """
        if self._unfinished:
            self._start_anew()
        self._unfinished = True
        try:
            yield
        except BaseException:
            self._start_anew()
            raise
        self._unfinished = False

    def _start_anew(self) -> None:
        """Make an empty cache, and a scheduler without threads."""
        self._scheduler = Scheduler(self.limits)
        self._filler = LaneFiller(self._scheduler, self._steps.pages_per_row, self._gate)
        self._pages = None  # the old ones' memory is free before the new ones take theirs
        self._pages = self._make_pages()
        self._unfinished = False

    def _launch(self, half: int, sampling: Sampling) -> list[tuple[Written, list[Place]]]:
        """Send a half's visit to the device. Return what it will write, and for whom; nothing where no thread runs."""
        self._copy(self._scheduler.cache.take_copies())
        while self._prefill_next():
            pass
        self._count_places()  # when the chunk's pages are reserved, and when its tokens are there
        lanes, placed = self._filler.decode(half)
        groups, workers = self._filler.groups() if self.limits.max_workers else (None, [])
        launched = []
        if placed:
            launched.append((self._decode(self._steps.decode, self._pack(lanes), sampling), placed))
        if workers:
            launched.append((self._decode(self._steps.decode_groups, self._pack(groups), sampling), workers))
        return launched

    def _land(self, driver: Driver, half: int) -> bool:
        """Wait for what the device writes for a half, and let its programs go on. False: nothing is in flight."""
        landed, self._in_flight[half] = self._in_flight[half], []
        for written, placed in landed:
            self._take(driver, jax.device_get(written), placed, half)
        if landed:
            self._count_places()
            driver.drain()
            self.stats.visits += 1
        return bool(landed)

    def _count_places(self) -> None:
        waste, places = self._scheduler.cache.waste()
        self.stats.wasted_places += waste
        self.stats.page_places += places

    def _prefill_next(self) -> bool:
        """Launch the next prefill call; False where there is nothing to prefill."""
        shards = range(self.limits.num_shards)
        chunks = [chunk for shard in shards for chunk in self._steps.prefill.take(self._scheduler, shard)]
        if chunks:
            prefill = self._prefill_lanes(chunks)
            self._launched()
            self._pages = self._steps.prefill(self._pages, self._params, prefill)
        self.stats.prefill_calls += bool(chunks)
        self.stats.prefilled += sum(chunk.count for chunk in chunks)
        return bool(chunks)

    def _take(self, driver: Driver, written: Written, placed: Sequence[Place], half: int) -> None:
        """Hand what a decode call wrote to those of the threads at `placed` that have not lost their lanes since."""
        stats, self._idle_since = self.stats, time.perf_counter()
        counts = written.counts.tolist()
        streams = [_by_lane(x) for x in (written.tokens, written.logprobs, written.shut_logprobs, written.kept)]
        for shard, lane, thread in placed:
            count = counts[shard][lane]
            if not self._scheduler.keeps(thread, half):
                self._scheduler.cache.dropped(thread, count)
                continue
            stats.generated += count
            driver.decoded(thread, *(stream[shard][lane][:count] if stream else [] for stream in streams))
        steps = int(written.steps.max())
        stats.decode_steps += steps
        stats.lane_steps += steps * written.counts.size

    def _launched(self) -> None:
        """Note that the device is about to get work: until now it may have waited for the host."""
        since, self._idle_since = self._idle_since, None
        awaited: list[Any] = [written.steps for flight in self._in_flight for written, _ in flight]
        if since is not None and all(steps.is_ready() for steps in awaited):
            self.stats.host_seconds += time.perf_counter() - since

    def _decode(self, step: ShardedStep, lanes: PackedArrays, sampling: Sampling) -> Written:
        """Launch a decode step, and return what it will write."""
        self._launched()
        self._pages, written = step(self._pages, self._params, lanes, sampling)
        return written

    def _copy(self, copies: list[list[Any]], *, force: bool = False) -> None:
        """Make the page copies in order; `force` calls the device even without any."""
        calls = max(-(-len(shard) // COPIES_PER_CALL) for shard in copies)
        for call in range(max(calls, int(force))):
            pairs = np.zeros((2, self.limits.num_shards, COPIES_PER_CALL), np.int32)
            for shard, todo in enumerate(copies):
                for index, copy in enumerate(todo[call * COPIES_PER_CALL : (call + 1) * COPIES_PER_CALL]):
                    pairs[:, shard, index] = copy.source, copy.target
            sources, targets = self._put(pairs[0]), self._put(pairs[1])
            self._launched()
            self._pages = self._steps.copy_pages(self._pages, sources, targets)

    def _prefill_lanes(self, chunks: Sequence[PrefillChunk]) -> PackedArrays:
        prefill = self._steps.prefill
        return self._pack(self._filler.prefill(chunks, prefill.num_lanes, prefill.width, prefill.aligned))

    def _sampling(self, temperature: float) -> Sampling:
        replicated = NamedSharding(self._mesh, partition_spec())
        sampling = Sampling(
            np.float32(temperature),  # type: ignore[arg-type]
            self._banned_mask,  # type: ignore[arg-type]
            self._gate_masks,
            self._truncation,
        )
        return jax.device_put(sampling, replicated)

    def _pack(self, lanes: Any) -> PackedArrays:
        return self._put(pack_arrays(lanes))

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, SHARDED))

    def _place(self, params: Any) -> Any:
        """Bring the weights to the devices, in decode's layout. The old ones make room for them, array by array."""
        old, self._params = self._params, None
        return self._weights.take(params, self._mesh, old)


def _by_lane(written: Any) -> list[list[list[Any]]]:
    """Return an array `[shards, steps, L]` as lists `[shards][L][steps]`, in one call instead of one for each lane.

    Of None they are empty.
    """
    return [] if written is None else np.swapaxes(written, 1, 2).tolist()
