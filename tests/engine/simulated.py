"""A cache without a model: the device's part of a visit, in the order of `engine.py`, on pages of numbers.

The key and value of a position are a function of the weights and of all tokens up to it. So here they are one number: a
chained hash of the policy version and those tokens, computed from the *stored* number of the position before. A page
that is stale, shared wrongly, copied late or adopted wrongly makes every later number of its thread wrong.
"""

import dataclasses
from collections.abc import Callable, Sequence

from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.thread_cache import PrefillChunk
from apr_jax.engine.threads import Thread


@dataclasses.dataclass(frozen=True)
class Place:
    """What one position of a page holds."""

    number: int
    alone: bool  # it and all before it were computed by prefill, whole pages at a time


def begin(version: int) -> Place:
    """What stands before a thread's first position."""
    return Place(hash((0x5EED, version)), alone=True)


def follow(before: Place, token: int, *, alone: bool) -> Place:
    return Place(hash((before.number, token)), before.alone and alone)


def chain(version: int, tokens: Sequence[int]) -> list[int]:
    """The numbers that a cache of these tokens must hold."""
    place, numbers = begin(version), []
    for token in tokens:
        place = follow(place, token, alone=True)
        numbers.append(place.number)
    return numbers


class SimulatedDevice:
    """Executes what a scheduler decides, and checks that every write goes to a page of one thread alone."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.page_size = scheduler.limits.page_size
        self.memory: list[list[list[Place | None]]] = [
            [[None] * self.page_size for _ in range(scheduler.limits.pages)] for _ in range(scheduler.limits.num_shards)
        ]
        self.version = 0
        self.copies = 0
        self.published: dict[bytes, tuple[int, tuple[int, ...]]] = {}  # key: (policy version, all tokens up to its end)

    def row(self, thread: Thread, *, after_copies: bool = False) -> list[Place | None]:
        """What the pages of a thread hold for its computed positions, before or after the copies that are pending."""
        assert thread.cached.table is not None
        memory = self.memory[thread.cached.shard]
        moved: dict[int, list[Place | None]] = {}
        if after_copies:
            for copy in self.scheduler.cache._copies[thread.cached.shard]:
                moved[copy.target] = moved.get(copy.source, memory[copy.source])
        pages = self.scheduler.cache.allocators[thread.cached.shard].pages(thread.cached.table)
        return [place for page in pages for place in moved.get(page, memory[page])][: thread.cached.computed]

    def copy(self) -> None:
        for shard, copies in enumerate(self.scheduler.cache.take_copies()):
            for copy in copies:
                self.memory[shard][copy.target] = list(self.memory[shard][copy.source])
                self.copies += 1

    def prefill(self) -> None:
        """All prefill calls of a visit. A call reads the pages as they were before it."""
        limits = self.scheduler.limits
        while True:
            shards = [self.scheduler.prefill_chunks(shard) for shard in range(limits.num_shards)]
            assert all(len(chunks) <= limits.prefill_lanes for chunks in shards)
            chunks = [chunk for chunks in shards for chunk in chunks]
            if not chunks:
                return
            assert len({chunk.thread for chunk in chunks}) == len(chunks), "two chunks of a thread in one call"
            computed = [self._compute(chunk) for chunk in chunks]
            self._write([(chunk.thread, chunk.start, new) for chunk, new in zip(chunks, computed, strict=True)])
            for chunk in chunks:
                self.scheduler.cache.prefilled(chunk)
                if chunk.publish_as is not None:
                    told = tuple(chunk.thread.tokens[: chunk.start + chunk.count])
                    assert self.published.setdefault(chunk.publish_as, (self.version, told)) == (self.version, told)

    def decode(self, draw: Callable[[Thread, Place], list[int]], half: int = 0) -> list[tuple[Thread, list[int]]]:
        """A decode chunk of every lane of a half; what each thread wrote. Rows are read before anything is written.

        `draw(thread, place)` gives the tokens that a thread writes after its last one, which computes to `place`.
        """
        written, writes = [], []
        limits = self.scheduler.limits
        for shard in range(limits.num_shards):
            for thread in self.scheduler.running(shard, half):
                assert self.scheduler.can_decode(thread), "a thread with a lane was not prefilled"
                if thread.group is not None and thread in thread.group.stopped:
                    continue
                row = self._read(thread, thread.cached.computed)
                place = follow(row[-1] if row else begin(self.version), thread.tokens[-1], alone=False)
                tokens, new = draw(thread, place), [place]
                if not tokens:
                    assert thread.max_generated == thread.generated, "a lane without anything to write"
                    new = []  # it was to be prefilled
                for token in tokens[:-1]:
                    new.append(follow(new[-1], token, alone=False))
                writes.append((thread, thread.cached.computed, new))
                written.append((thread, tokens))
        self._write(writes)
        return written

    def _compute(self, chunk: PrefillChunk) -> list[Place]:
        thread, end = chunk.thread, chunk.start + chunk.count
        assert chunk.start == thread.cached.computed
        assert chunk.start // self.page_size == (end - 1) // self.page_size, "a prefill chunk crosses a page"
        row = self._read(thread, chunk.start)
        place, new = row[-1] if row else begin(self.version), []
        whole = chunk.count == self.page_size
        for token in thread.tokens[chunk.start : end]:
            place = follow(place, token, alone=whole)
            new.append(place)
        return new

    def _read(self, thread: Thread, length: int) -> list[Place]:
        """What attention reads: every position must hold this very thread's tokens under these weights."""
        row = self.row(thread)[:length]
        places = [place for place in row if place is not None]
        assert [place.number for place in places] == chain(self.version, thread.tokens[:length]), "a stale page is read"
        return places

    def _write(self, writes: list[tuple[Thread, int, list[Place]]]) -> None:
        owners: dict[tuple[int, int], Thread] = {}
        for thread, start, places in writes:
            allocator = self.scheduler.cache.allocators[thread.cached.shard]
            for position, place in enumerate(places, start=start):
                page = allocator.pages(thread.cached.table)[position // self.page_size]
                assert page != 0, "a thread writes to the trash page"
                assert allocator._refcounts[page] == 1, "a page that is written is shared"
                assert page not in allocator._key_of, "a page that is written is published"
                assert owners.setdefault((thread.cached.shard, page), thread) is thread, "two threads write to one page"
                self.memory[thread.cached.shard][page][position % self.page_size] = place
