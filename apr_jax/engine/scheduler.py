"""The scheduler: it chooses the threads that run, and their lanes. Host only, no JAX, deterministic.

Order is `Thread.priority`: earlier rollouts first, and within a rollout deeper threads first. A thread may take pages
only from threads that come after it, and gives up its own when there are none. The first thread that wants to decode
can therefore always run (one full thread fits in a shard, which `Limits` checks), so every thread ends. A thread whose
pages were taken keeps its tokens and is recomputed by prefill when it runs again.

Where `Limits.halves` is 2, a visit is of one half of the lanes, and the threads of the other half are meanwhile *in
flight*: the device decodes them. They may lose their pages or be released like all others. What the device wrote for
them is then dropped (`keeps`), and whoever has their pages writes to them after that, as the device takes its work in
order.

Workers on a shared cache (`groups.py`) come and go together and are never preempted: the pages they hold from their
start suffice to their end, so threads that wait for them wait no longer than a Decode takes.
"""

import heapq
from collections.abc import Callable, Iterator

from apr_jax.engine.groups import Group
from apr_jax.engine.limits import Limits
from apr_jax.engine.pages import OutOfPagesError
from apr_jax.engine.thread_cache import PrefillChunk, ThreadCache
from apr_jax.engine.threads import Path, Status, Thread


class Scheduler:
    """The lanes, the queue for them, and the only owner of every thread's `turn` record."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.cache = ThreadCache(limits)
        self.lanes: list[list[Thread | None]] = [[None] * limits.lanes for _ in range(limits.num_shards)]
        self.preemptions = 0
        self._ready: list[tuple[tuple[int, int, Path], int, Thread]] = []
        self._tickets = 0

    def running(self, shard: int, half: int | None = None) -> list[Thread]:
        """Return the threads that have a lane, or one in a half, by lane."""
        lanes = self.lanes[shard] if half is None else self._half(shard, half)
        return [thread for thread in lanes if thread is not None]

    def keeps(self, thread: Thread, half: int) -> bool:
        """Return True where a thread that had a lane in a half when that was visited has it still."""
        return thread.turn.status is Status.RUNNING and thread.turn.lane // self.limits.lanes_in_turn == half

    def groups(self, shard: int) -> list[Group]:
        """Return the groups that have lanes, in the order of their priority."""
        groups = {thread.group: None for thread in self.running(shard) if thread.group is not None}
        return sorted(groups, key=lambda group: group.workers[0].priority)

    @property
    def num_running(self) -> int:
        """Threads that have a lane."""
        return sum(len(self.running(shard)) for shard in range(self.limits.num_shards))

    def submit(self, thread: Thread) -> None:
        """Put a thread that wants to decode in the queue."""
        thread.turn.status = Status.READY
        self._push(thread)

    def submit_group(self, group: Group) -> None:
        """Put a group in the queue. Raises ValueError for too many workers, ConfigError where pages never suffice."""
        if len(group.workers) > self.limits.max_workers:
            raise ValueError(
                f"{len(group.workers)} workers on a shared cache, and the engine was made for {self.limits.max_workers}"
                " (Engine's max_workers)"
            )
        allocator = self.cache.allocators[0]
        needed = sum(allocator.pages_for(self.limits.final_length(worker)) for worker in group.workers)
        self.limits.check_group(len(group.workers), needed)
        for worker in group.workers:
            worker.turn.status = Status.READY
        self._push(group.workers[0])

    def leave_lane(self, thread: Thread) -> None:
        """Let a running thread stop decoding; it keeps its pages. A worker keeps its lane too, until its group ends."""
        if thread.group is not None:
            self._stop_worker(thread)
            return
        self._clear_lane(thread)
        thread.turn.status = Status.IDLE
        self.cache.drop_room(thread)

    def wait_for_children(self, thread: Thread) -> None:
        """Note that the thread asks for nothing until its children have ended."""
        thread.turn.status = Status.WAITING_ON_CHILDREN

    def resume(self, thread: Thread) -> None:
        """Note that the thread's children have ended."""
        thread.turn.status = Status.IDLE

    def release(self, thread: Thread) -> None:
        """End a thread, whatever its state: its pages are free at once, a worker's when its whole group has ended."""
        if thread.group is not None and thread.turn.status is Status.RUNNING:
            self._stop_worker(thread)
            return
        if thread.turn.status is Status.RUNNING:
            self._clear_lane(thread)
        thread.turn.status = Status.DONE
        self.cache.free(thread)

    def admit(self, next_root: Callable[[], bool], half: int = 0) -> None:
        """Reserve the next chunk's pages for every running thread of a half, then fill its free lanes, before a visit.

        The second half of a shard gets threads while its first half is full: few threads then decode together.

        Args:
            next_root: starts one more root program, which may `submit` a thread; False when there is none left. It is
                called only while a lane is free and nobody waits for one.
        """
        for shard in range(self.limits.num_shards):
            for thread in sorted(self.running(shard, half), key=lambda t: t.priority):
                # A group has all that it needs since it was admitted.
                if thread.group is None and thread.turn.status is Status.RUNNING and not self._reserve(thread):
                    self._preempt(thread)
        while self._free_shard(half) is not None:
            waiting = self._pop()
            if waiting is None:
                if not next_root():
                    return
            elif not (self._admit_one(waiting, half) if waiting.group is None else self._admit_group(waiting.group)):
                self._push(waiting)
                return

    def prefill_chunks(self, shard: int) -> list[PrefillChunk]:
        """Return the next prefill call's work on a shard: at most one chunk a thread and `prefill_lanes` in all.

        Threads that find their next page published adopt it instead. Of several threads that need the same page one
        computes it, and the others wait for it. Call `cache.prefilled` when the chunks are sent to the device.
        """
        chunks: list[PrefillChunk] = []
        in_flight: set[bytes] = set()
        for thread in self.running(shard):
            if len(chunks) == self.limits.prefill_lanes:
                break
            chunk = self.cache.next_chunk(thread)
            if chunk is None or chunk.publish_as in in_flight:
                continue
            if chunk.publish_as is not None:
                in_flight.add(chunk.publish_as)
            chunks.append(chunk)
        return chunks

    def can_decode(self, thread: Thread) -> bool:
        """Return True where all tokens but the last are computed: decode takes the last as its first input."""
        return thread.cached.computed == len(thread.tokens) - 1

    def check(self) -> None:
        """Raise AssertionError unless pages, lanes, queue and threads agree."""
        self.cache.check()
        queued = [thread for *_, thread in self._ready if thread.turn.status is Status.READY]
        assert len(queued) == len(set(queued)), "a thread stands twice in the queue"
        for shard in range(self.limits.num_shards):
            assert len(self.lanes[shard]) == self.limits.lanes
            for lane, thread in enumerate(self.lanes[shard]):
                if thread is None:
                    continue
                assert thread in self.cache.holders[shard], "a running thread without pages"
                assert thread.turn.status is Status.RUNNING
                assert thread.turn.lane == lane

    def _push(self, thread: Thread) -> None:
        self._tickets += 1
        heapq.heappush(self._ready, (thread.priority, self._tickets, thread))

    def _pop(self) -> Thread | None:
        while self._ready:
            thread = heapq.heappop(self._ready)[2]
            if thread.turn.status is Status.READY:
                return thread
        return None

    def _half(self, shard: int, half: int) -> list[Thread | None]:
        size = self.limits.lanes_in_turn
        return self.lanes[shard][half * size : (half + 1) * size]

    def _free(self, shard: int, half: int) -> int:
        """Count the lanes of a half that a thread may take."""
        return 0 if half and self._free(shard, half - 1) else self._half(shard, half).count(None)

    def _free_shard(self, half: int = 0) -> int | None:
        """Return the shard with most free lanes in a half (then most pages available), or None."""
        free = [self._free(shard, half) for shard in range(self.limits.num_shards)]
        best = max(range(len(free)), key=lambda s: (free[s], self.cache.allocators[s].num_available, -s))
        return best if free[best] else None

    def _admit_one(self, thread: Thread, half: int) -> bool:
        if thread.cached.table is None:
            shard = self._free_shard(half)
            assert shard is not None
            self.cache.open(thread, shard)
            if not self._reserve(thread):
                self.cache.free(thread)
                return False
        elif None not in self.lanes[thread.cached.shard]:
            # Its pages are on a shard without a free lane: it moves, and is computed anew.
            self.cache.free(thread)
            return self._admit_one(thread, half)
        elif not self._free(thread.cached.shard, half) or not self._reserve(thread):
            return False  # where the free lanes are of the other half, its visit is the next
        self._take_lane(thread, half)
        return True

    def _admit_group(self, group: Group) -> bool:
        """Give all workers a lane and all pages that they may need on one shard, or nothing to any.

        While it is first in line nobody gets a lane, so lanes become free; and when nothing runs it may take the pages
        of all others, since then nobody who comes before it holds any.
        """
        shard = self._free_shard()
        assert shard is not None
        full = len(self.groups(shard)) >= self.limits.max_groups
        if full or self.lanes[shard].count(None) < len(group.workers):
            return False
        for worker in group.workers:
            self.cache.open(worker, shard)
            if not self._reserve(worker):
                for opened in group.workers:
                    self.cache.free(opened)
                return False
        for worker in group.workers:
            self._take_lane(worker, 0)
        return True

    def _stop_worker(self, worker: Thread) -> None:
        """Let a worker write no more. Its group ends with the last one; until then the others see its pages."""
        group = worker.group
        assert group is not None
        if group.stop(worker):
            for each in group.workers:
                self._clear_lane(each)
                self.cache.free(each)
                each.turn.status = Status.DONE

    def _take_lane(self, thread: Thread, half: int) -> None:
        lanes = self.lanes[thread.cached.shard]
        thread.turn.status = Status.RUNNING
        thread.turn.lane = lanes.index(None, half * self.limits.lanes_in_turn)
        lanes[thread.turn.lane] = thread

    def _clear_lane(self, thread: Thread) -> None:
        self.lanes[thread.cached.shard][thread.turn.lane] = None

    def _reserve(self, thread: Thread) -> bool:
        """Make the pages of the thread's tokens and its next chunk its own to write. False: there are not enough."""
        length = min(len(thread.tokens) + self.limits.steps_per_visit, self.limits.max_seq_len)
        if thread.group is not None:
            length = self.limits.final_length(thread)
        victims: Iterator[Thread] | None = None
        while True:
            try:
                self.cache.make_room(thread, length)
                return True
            except OutOfPagesError:
                victims = victims or self._victims(thread)
                victim = next(victims, None)
                if victim is None:
                    return False
                self._preempt(victim)

    def _victims(self, thread: Thread) -> Iterator[Thread]:
        """Yield those whose pages the thread may take, last in priority first. Groups keep theirs."""
        holders = self.cache.holders[thread.cached.shard]
        later = [other for other in holders if other.group is None and other.priority > thread.priority]
        return iter(sorted(later, key=lambda other: other.priority, reverse=True))

    def _preempt(self, thread: Thread) -> None:
        self.preemptions += 1
        running = thread.turn.status is Status.RUNNING
        if running:
            self._clear_lane(thread)
        self.cache.free(thread)
        if running:
            self.submit(thread)
