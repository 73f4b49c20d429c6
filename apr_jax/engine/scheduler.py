"""Which threads hold pages and lanes. Host only, no JAX, deterministic.

Order is `Thread.priority`: earlier rollouts first, and within a rollout deeper threads first. A thread may take pages
only from threads that come after it, and gives up its own when there are none. The first thread that wants to decode
can therefore always run (one full thread fits in a shard, which the constructor checks), so every thread ends. A
thread whose pages were taken keeps its tokens and is recomputed by prefill when it runs again.

Workers on a shared cache (`groups.py`) come and go together and are never preempted: what they hold from their start
suffices to their end, so those who wait for it wait no longer than a Decode takes.
"""

import dataclasses
import heapq
import sys
from collections.abc import Callable, Iterator

from apr_jax.config import ConfigError
from apr_jax.engine.groups import Group
from apr_jax.engine.pages import OutOfPagesError, PageAllocator, PageCopy, block_key, root_key
from apr_jax.engine.threads import Path, Status, Thread


@dataclasses.dataclass(frozen=True)
class Limits:
    """The engine's sizes, per data shard."""

    num_shards: int
    lanes: int  # threads decoded together
    pages: int
    page_size: int
    max_seq_len: int
    steps_per_visit: int
    prefill_lanes: int
    prefix_reuse: bool
    block_size: int = 1  # positions that a decode step reads at once
    row_blocks: int = sys.maxsize  # blocks that the running threads may fill together
    max_workers: int = 0  # of a group on a shared cache; 0: there are none

    def __post_init__(self) -> None:
        needed = -(-self.max_seq_len // self.page_size)
        if self.pages - 1 < needed:
            raise ConfigError(
                f"a data shard has {self.pages - 1} usable pages, and one thread of model.max_seq_len="
                f"{self.max_seq_len} tokens needs {needed} of engine.page_size={self.page_size}"
            )

        if self.row_blocks * self.block_size < self.max_seq_len:
            raise ConfigError(
                f"row_blocks={self.row_blocks} of {self.block_size} positions don't hold one thread of "
                f"model.max_seq_len={self.max_seq_len} tokens"
            )

        if self.max_workers > self.lanes:
            raise ConfigError(
                f"{self.max_workers} workers on a shared cache need as many lanes in a data shard, which has "
                f"{self.lanes}; raise engine.lanes"
            )

    @property
    def max_groups(self) -> int:
        """Groups that decode together."""
        return self.lanes // self.max_workers if self.max_workers else 0

    @property
    def blocks_can_run_out(self) -> bool:
        """Whether threads in all lanes could fill more than `row_blocks`."""
        return self.lanes * -(-self.max_seq_len // self.block_size) > self.row_blocks

    def blocks_for(self, thread: Thread) -> int:
        """Blocks that a decode step reads of the thread: all its tokens but the last."""
        return -(-(len(thread.tokens) - 1) // self.block_size)


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `[start, start + count)` of a thread, within one page, whose keys and values are to be computed."""

    thread: Thread
    start: int
    count: int
    publish_as: bytes | None  # the page's key once computed, when it may be shared


class Scheduler:
    """Owns the threads' lanes, page tables and states."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.allocators = [PageAllocator(limits.pages, limits.page_size) for _ in range(limits.num_shards)]
        self.lanes: list[list[Thread | None]] = [[None] * limits.lanes for _ in range(limits.num_shards)]
        self.preemptions = 0
        self.reused_tokens = 0
        self._ready: list[tuple[tuple[int, int, Path], int, Thread]] = []
        self._tickets = 0
        self._holders: list[dict[Thread, None]] = [{} for _ in range(limits.num_shards)]
        self._copies: list[list[PageCopy]] = [[] for _ in range(limits.num_shards)]
        self._policy_version = 0

    def new_policy(self) -> None:
        """The weights changed: nothing computed before may be adopted again. Only between runs."""
        self._policy_version += 1
        for allocator in self.allocators:
            allocator.forget_published()

    def running(self, shard: int) -> list[Thread]:
        """The threads that have a lane, by lane."""
        return [thread for thread in self.lanes[shard] if thread is not None]

    def groups(self, shard: int) -> list[Group]:
        """The groups that have lanes, in the order of their priority."""
        groups = {thread.group: None for thread in self.running(shard) if thread.group is not None}
        return sorted(groups, key=lambda group: group.workers[0].priority)

    @property
    def num_running(self) -> int:
        return sum(len(self.running(shard)) for shard in range(self.limits.num_shards))

    def submit(self, thread: Thread) -> None:
        """The thread wants to decode."""
        thread.status = Status.READY
        self._push(thread)

    def submit_group(self, group: Group) -> None:
        """All workers want to decode. Raises ValueError for too many of them, ConfigError where pages never suffice."""
        if len(group.workers) > self.limits.max_workers:
            raise ValueError(
                f"{len(group.workers)} workers on a shared cache, and the engine was made for {self.limits.max_workers}"
                " (Engine's max_workers)"
            )
        needed = sum(self.allocators[0].pages_for(self._final_length(worker)) for worker in group.workers)
        if needed > self.allocators[0].num_usable:
            raise ConfigError(
                f"{len(group.workers)} workers on a shared cache may need {needed} pages of engine.page_size="
                f"{self.limits.page_size}, and a data shard has {self.allocators[0].num_usable} usable ones; raise "
                "engine.pages"
            )
        for worker in group.workers:
            worker.status = Status.READY
        self._push(group.workers[0])

    def fork(self, parent: Thread, child: Thread) -> None:
        """Lets a child, whose tokens begin with all its parent's, share the parent's pages (at most one is copied)."""
        if parent.table is None:
            return
        length = parent.computed
        allocator = self.allocators[parent.shard]
        try:
            child.table, copy = allocator.fork(parent.table, length)
        except OutOfPagesError:
            return
        child.shard, child.computed = parent.shard, length
        child.block_keys = parent.block_keys[: length // self.limits.page_size]
        self._holders[child.shard][child] = None
        if copy is not None:
            self._copies[child.shard].append(copy)

    def truncate(self, thread: Thread, length: int) -> None:
        """Keeps the thread's first `length` tokens; pages behind them are free at once."""
        del thread.tokens[length:]
        # The last token is always computed by decode, so that there is a hidden state to go on from.
        thread.computed = min(thread.computed, length - 1)
        del thread.block_keys[thread.computed // self.limits.page_size :]
        if thread.table is not None:
            self.allocators[thread.shard].truncate(thread.table, length)

    def leave_lane(self, thread: Thread, status: Status) -> None:
        """A running thread stops decoding; it keeps its pages unless it is done. A worker keeps its lane, too."""
        if thread.group is not None:
            self._stop_worker(thread)
            return
        self._clear_lane(thread)
        thread.status = status
        if status is Status.DONE:
            self.release(thread)
        elif thread.table is not None:
            self.allocators[thread.shard].truncate(thread.table, thread.computed)

    def release(self, thread: Thread) -> None:
        """Ends a thread, whatever its state: its pages are free at once, a worker's when its whole group has ended."""
        if thread.group is not None and thread.status is Status.RUNNING:
            self._stop_worker(thread)
            return
        if thread.status is Status.RUNNING:
            self._clear_lane(thread)
        thread.status = Status.DONE
        self._free_pages(thread)

    def admit(self, next_root: Callable[[], bool]) -> None:
        """Before a visit: reserves the next chunk's pages for every running thread, then fills free lanes.

        Args:
            next_root: starts one more root program, which may `submit` a thread; False when there is none left. It is
                called only while a lane is free and nobody waits for one.
        """
        for shard in range(self.limits.num_shards):
            for thread in sorted(self.running(shard), key=lambda t: t.priority):
                # A group has all that it needs since it was admitted.
                if thread.group is None and thread.status is Status.RUNNING and not self._reserve(thread):
                    self._preempt(thread)
        while self._free_shard() is not None:
            waiting = self._pop()
            if waiting is None:
                if not next_root():
                    return
            elif not (self._admit_one(waiting) if waiting.group is None else self._admit_group(waiting.group)):
                self._push(waiting)
                return

    def prefill_chunks(self, shard: int) -> list[PrefillChunk]:
        """The next prefill call's work on a shard: at most one chunk a thread and `prefill_lanes` in all.

        Threads that find their next page published adopt it instead. Of several threads that need the same page one
        computes it, and the others wait for it. Call `prefilled` when the chunks have been sent to the device.
        """
        chunks: list[PrefillChunk] = []
        in_flight: set[bytes] = set()
        for thread in self.running(shard):
            if len(chunks) == self.limits.prefill_lanes:
                break
            chunk = self._next_chunk(thread)
            if chunk is None or chunk.publish_as in in_flight:
                continue
            if chunk.publish_as is not None:
                in_flight.add(chunk.publish_as)
            chunks.append(chunk)
        return chunks

    def prefilled(self, chunk: PrefillChunk) -> None:
        """The chunk's keys and values are in its page (or will be before anything that is sent to the device later)."""
        thread = chunk.thread
        thread.computed += chunk.count
        thread.work = thread.work.with_prefill(chunk.start, chunk.count)
        if chunk.publish_as is not None and thread.table is not None:
            thread.block_keys.append(chunk.publish_as)
            index = chunk.start // self.limits.page_size
            self.allocators[thread.shard].publish(thread.table, index, chunk.publish_as)

    def can_decode(self, thread: Thread) -> bool:
        """All tokens but the last are computed: decode takes the last as its first input."""
        return thread.computed == len(thread.tokens) - 1

    def decoded(self, thread: Thread, tokens: list[int]) -> None:
        """A chunk wrote these tokens; the device computed every one but the last."""
        thread.tokens.extend(tokens)
        thread.generated += len(tokens)
        thread.computed = len(thread.tokens) - 1

    def take_copies(self) -> list[list[PageCopy]]:
        """Page copies that the device must make before its next step, per shard; the scheduler forgets them."""
        copies, self._copies = self._copies, [[] for _ in self._copies]
        return copies

    def waste(self) -> tuple[int, int]:
        """Token places in held pages that hold no token, and token places in held pages."""
        places = sum(allocator.num_held for allocator in self.allocators) * self.limits.page_size
        used = sum(min(thread.computed + 1, len(thread.tokens)) for holders in self._holders for thread in holders)
        return max(0, places - used), places

    def check(self) -> None:
        """Raises AssertionError unless allocators, lanes and threads agree."""
        for shard, allocator in enumerate(self.allocators):
            allocator.check()
            assert len(self.lanes[shard]) == self.limits.lanes
            for thread in self._holders[shard]:
                assert thread.table is not None, "a holder without pages"
                assert thread.shard == shard
                assert thread.status is not Status.DONE
                assert len(allocator.pages(thread.table)) >= allocator.pages_for(thread.computed)
            for thread in self.running(shard):
                assert thread in self._holders[shard], "a running thread without pages"
                assert thread.status is Status.RUNNING
                assert self.lanes[shard][thread.lane] is thread

    def _push(self, thread: Thread) -> None:
        self._tickets += 1
        heapq.heappush(self._ready, (thread.priority, self._tickets, thread))

    def _pop(self) -> Thread | None:
        while self._ready:
            thread = heapq.heappop(self._ready)[2]
            if thread.status is Status.READY:
                return thread
        return None

    def _free_shard(self) -> int | None:
        """The shard with most free lanes (then most pages available), or None."""
        free = [lanes.count(None) for lanes in self.lanes]
        best = max(range(len(free)), key=lambda s: (free[s], self.allocators[s].num_available, -s))
        return best if free[best] else None

    def _admit_one(self, thread: Thread) -> bool:
        if thread.table is None:
            shard = self._free_shard()
            assert shard is not None
            self._open(thread, shard)
            if not self._reserve(thread):
                self._free_pages(thread)
                return False
        elif None not in self.lanes[thread.shard]:
            # Its pages are on a shard without a free lane: it moves, and is computed anew.
            self._free_pages(thread)
            return self._admit_one(thread)
        elif not self._reserve(thread):
            return False
        self._take_lane(thread)
        return True

    def _admit_group(self, group: Group) -> bool:
        """All workers get a lane and all pages that they may need on one shard, or none gets anything.

        While it is first in line nobody gets a lane, so lanes become free; and when nothing runs it may take the pages
        of all others, since then nobody who comes before it holds any.
        """
        shard = self._free_shard()
        assert shard is not None
        full = len(self.groups(shard)) >= self.limits.max_groups
        if full or self.lanes[shard].count(None) < len(group.workers):
            return False
        for worker in group.workers:
            self._open(worker, shard)
            if not self._reserve(worker):
                for opened in group.workers:
                    self._free_pages(opened)
                return False
        for worker in group.workers:
            self._take_lane(worker)
        return True

    def _stop_worker(self, worker: Thread) -> None:
        """A worker writes no more. Its group ends with the last one; until then the others see its pages."""
        group = worker.group
        assert group is not None
        if group.stop(worker):
            for each in group.workers:
                self._clear_lane(each)
                self._free_pages(each)
                each.status = Status.DONE

    def _take_lane(self, thread: Thread) -> None:
        thread.status = Status.RUNNING
        lanes = self.lanes[thread.shard]
        thread.lane = lanes.index(None)
        lanes[thread.lane] = thread

    def _clear_lane(self, thread: Thread) -> None:
        self.lanes[thread.shard][thread.lane] = None

    def _open(self, thread: Thread, shard: int) -> None:
        thread.shard, thread.table, thread.computed = shard, self.allocators[shard].open(), 0
        thread.block_keys = []
        self._holders[shard][thread] = None
        self._next_chunk(thread)  # adopts what is published, so that less has to be reserved

    def _reserve(self, thread: Thread) -> bool:
        """Makes the pages of the thread's tokens and its next chunk its own to write. False: there are not enough."""
        assert thread.table is not None
        allocator = self.allocators[thread.shard]
        length = min(len(thread.tokens) + self.limits.steps_per_visit, self.limits.max_seq_len)
        if thread.group is not None:
            length = self._final_length(thread)
        first_written = thread.computed // self.limits.page_size
        victims: Iterator[Thread] | None = None
        while True:
            try:
                self._require_blocks(thread)
                if first_written < len(allocator.pages(thread.table)):
                    copy = allocator.make_writable(thread.table, first_written)
                    if copy is not None:
                        self._copies[thread.shard].append(copy)
                allocator.grow(thread.table, length)
                return True
            except OutOfPagesError:
                victims = victims or self._victims(thread)
                victim = next(victims, None)
                if victim is None:
                    return False
                self._preempt(victim)

    def _final_length(self, thread: Thread) -> int:
        """Tokens that the thread has when its Decode ends, at most."""
        return min(len(thread.tokens) + thread.max_generated - thread.generated, thread.max_length)

    def _require_blocks(self, thread: Thread) -> None:
        """Raises OutOfPagesError where the thread and those that run before it fill more blocks than a step can read.

        Only threads that share pages can: without sharing, the pages run out first. Groups are read in another way.
        """
        if thread.group is not None or not self.limits.blocks_can_run_out:
            return
        running = [other for other in self.running(thread.shard) if other is not thread and other.group is None]
        blocks = sum(self.limits.blocks_for(other) for other in [*running, thread])
        if blocks > self.limits.row_blocks:
            raise OutOfPagesError(f"{blocks} blocks are to be read, and {self.limits.row_blocks} can be")

    def _victims(self, thread: Thread) -> Iterator[Thread]:
        """Those whose pages the thread may take, last in priority first. Groups keep theirs."""
        holders = self._holders[thread.shard]
        later = [other for other in holders if other.group is None and other.priority > thread.priority]
        return iter(sorted(later, key=lambda other: other.priority, reverse=True))

    def _preempt(self, thread: Thread) -> None:
        self.preemptions += 1
        self._free_pages(thread)
        if thread.status is Status.RUNNING:
            self._clear_lane(thread)
            self.submit(thread)

    def _free_pages(self, thread: Thread) -> None:
        if thread.table is not None:
            self.allocators[thread.shard].free(thread.table)
            del self._holders[thread.shard][thread]
        thread.table, thread.computed = None, 0
        thread.block_keys = []

    def _next_chunk(self, thread: Thread) -> PrefillChunk | None:
        """Adopts what is published; returns the thread's next chunk, or None when only its last token is left."""
        assert thread.table is not None
        page_size, last = self.limits.page_size, len(thread.tokens) - 1
        while thread.computed < last:
            start = thread.computed
            count = min(last, (start // page_size + 1) * page_size) - start
            # A page may be shared only if it and all before it were computed by prefill in whole pages: then its
            # contents are a function of its tokens alone, bit for bit.
            aligned = count == page_size and start == len(thread.block_keys) * page_size
            if not (self.limits.prefix_reuse and aligned):
                return PrefillChunk(thread, start, count, None)
            parent = thread.block_keys[-1] if thread.block_keys else root_key(self._policy_version)
            key = block_key(parent, thread.tokens[start : start + count])
            if not self.allocators[thread.shard].adopt(thread.table, start // page_size, key):
                return PrefillChunk(thread, start, count, key)
            thread.block_keys.append(key)
            thread.computed += count
            self.reused_tokens += count
        return None
