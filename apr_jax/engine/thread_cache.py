"""The cache of each thread: page tables, computed tokens, and prefixes that other threads may adopt. No JAX.

A page may be shared only if it and all before it were computed by prefill in whole pages. Its contents are then a
function of its tokens and the weights alone, bit for bit.
"""

import dataclasses

from apr_jax.engine.limits import Limits
from apr_jax.engine.pages import OutOfPagesError, PageAllocator, PageCopy, block_key, root_key
from apr_jax.engine.threads import Status, Thread


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `[start, start + count)` of a thread, within one page, whose keys and values are to be computed."""

    thread: Thread
    start: int
    count: int
    publish_as: bytes | None  # the page's key once computed, when it may be shared


class ThreadCache:
    """The only owner of every thread's `cached` record."""

    def __init__(self, limits: Limits):
        self._page_size, self._prefix_reuse = limits.page_size, limits.prefix_reuse
        self.allocators = [PageAllocator(limits.pages, limits.page_size) for _ in range(limits.num_shards)]
        self.holders: list[dict[Thread, None]] = [{} for _ in range(limits.num_shards)]  # threads with pages
        self.reused_tokens = 0
        self._copies: list[list[PageCopy]] = [[] for _ in range(limits.num_shards)]
        self._policy_version = 0

    def new_policy(self) -> None:
        """Let nothing that was computed so far be adopted again: the weights changed. Only between runs."""
        self._policy_version += 1
        for allocator in self.allocators:
            allocator.forget_published()

    def pages(self, thread: Thread) -> list[int]:
        """Return the thread's pages. The list is the allocator's: read it, don't keep it."""
        assert thread.cached.table is not None
        return self.allocators[thread.cached.shard].pages(thread.cached.table)

    def open(self, thread: Thread, shard: int) -> None:
        """Give the thread a page table on a shard; it adopts what is published of its tokens."""
        cached = thread.cached
        cached.shard, cached.table, cached.computed, cached.block_keys = shard, self.allocators[shard].open(), 0, []
        self.holders[shard][thread] = None
        self.next_chunk(thread)

    def fork(self, parent: Thread, child: Thread) -> None:
        """Let a child, whose tokens begin with all its parent's, share the parent's pages (at most one is copied)."""
        theirs, own = parent.cached, child.cached
        if theirs.table is None:
            return
        try:
            own.table, copy = self.allocators[theirs.shard].fork(theirs.table, theirs.computed)
        except OutOfPagesError:
            return
        own.shard, own.computed = theirs.shard, theirs.computed
        own.block_keys = theirs.block_keys[: own.computed // self._page_size]
        self.holders[own.shard][child] = None
        self._copy(own.shard, copy)

    def make_room(self, thread: Thread, length: int) -> None:
        """Make the pages of positions from the first not computed up to `length` the thread's own to write.

        Raises OutOfPagesError where there are not enough; then nothing but a copy was made.
        """
        cached, allocator = thread.cached, self.allocators[thread.cached.shard]
        assert cached.table is not None
        first_written = cached.computed // self._page_size
        if first_written < len(allocator.pages(cached.table)):
            self._copy(cached.shard, allocator.make_writable(cached.table, first_written))
        allocator.grow(cached.table, length)

    def truncate(self, thread: Thread, length: int) -> None:
        """Keep what belongs to the thread's first `length` tokens; pages behind them are free at once."""
        cached = thread.cached
        # The last token is always computed by decode, so that there is a hidden state to go on from.
        cached.computed = min(cached.computed, length - 1)
        del cached.block_keys[cached.computed // self._page_size :]
        if cached.table is not None:
            self.allocators[cached.shard].truncate(cached.table, length)

    def drop_room(self, thread: Thread) -> None:
        """Free the pages that the thread has reserved and not filled."""
        if thread.cached.table is not None:
            self.allocators[thread.cached.shard].truncate(thread.cached.table, thread.cached.computed)

    def free(self, thread: Thread) -> None:
        """Free all that the thread holds."""
        cached = thread.cached
        if cached.table is not None:
            self.allocators[cached.shard].free(cached.table)
            del self.holders[cached.shard][thread]
        cached.table, cached.computed, cached.block_keys = None, 0, []

    def next_chunk(self, thread: Thread) -> PrefillChunk | None:
        """Adopt what is published; return the thread's next chunk, or None when only its last token is left."""
        cached, page_size, last = thread.cached, self._page_size, len(thread.tokens) - 1
        assert cached.table is not None
        while cached.computed < last:
            start = cached.computed
            count = min(last, (start // page_size + 1) * page_size) - start
            aligned = count == page_size and start == len(cached.block_keys) * page_size
            if not (self._prefix_reuse and aligned):
                return PrefillChunk(thread, start, count, None)
            parent = cached.block_keys[-1] if cached.block_keys else root_key(self._policy_version)
            key = block_key(parent, thread.tokens[start : start + count])
            if not self.allocators[cached.shard].adopt(cached.table, start // page_size, key):
                return PrefillChunk(thread, start, count, key)
            cached.block_keys.append(key)
            cached.computed += count
            self.reused_tokens += count
        return None

    def prefilled(self, chunk: PrefillChunk) -> None:
        """Note that the chunk's page has its keys and values, or will have them before the device's next work."""
        cached = chunk.thread.cached
        cached.computed += chunk.count
        cached.work = cached.work.with_prefill(chunk.start, chunk.count)
        if chunk.publish_as is not None and cached.table is not None:
            cached.block_keys.append(chunk.publish_as)
            self.allocators[cached.shard].publish(cached.table, chunk.start // self._page_size, chunk.publish_as)

    def decoded(self, thread: Thread, drawn: int, kept: int) -> None:
        """Note that decode drew tokens after the thread's last one, and `kept` of them are about to stand.

        The device computed every token but the last that stands.
        """
        cached, before = thread.cached, len(thread.tokens) - 1
        cached.work = cached.work.with_decode(before, drawn)
        cached.computed = before + kept

    def dropped(self, thread: Thread, drawn: int) -> None:
        """Note that decode drew tokens after the thread's last one, none of which stands."""
        thread.cached.work = thread.cached.work.with_decode(len(thread.tokens) - 1, drawn)

    def take_copies(self) -> list[list[PageCopy]]:
        """Return the copies that the device must make before its next step, per shard, and forget them."""
        copies, self._copies = self._copies, [[] for _ in self._copies]
        return copies

    def waste(self) -> tuple[int, int]:
        """Count the token places in held pages that hold no token, and all token places in held pages."""
        places = sum(allocator.num_held for allocator in self.allocators) * self._page_size
        used = sum(min(thread.cached.computed + 1, len(thread.tokens)) for each in self.holders for thread in each)
        return max(0, places - used), places

    def check(self) -> None:
        """Raise AssertionError unless allocators and threads agree."""
        for shard, allocator in enumerate(self.allocators):
            allocator.check()
            for thread in self.holders[shard]:
                cached = thread.cached
                assert cached.table is not None, "a holder without pages"
                assert cached.shard == shard
                assert thread.turn.status is not Status.DONE, "pages outlive their thread"
                assert 0 <= cached.computed < len(thread.tokens), "the last token is decode's to compute"
                assert len(allocator.pages(cached.table)) >= allocator.pages_for(cached.computed)
                assert len(cached.block_keys) * self._page_size <= cached.computed, "a page is shared before it is full"

    def _copy(self, shard: int, copy: PageCopy | None) -> None:
        if copy is not None:
            self._copies[shard].append(copy)
