"""Pages of KV cache, on the host: who holds which page, and which pages may be shared.

    page 0            the trash page: idle lanes write to it, nobody reads it, it is never handed out
    free              on the free list
    held              in one or more tables; its refcount is the number of table entries that name it
    cached            in no table, but published: a prompt that begins alike may still adopt it; evicted oldest first

A *table* is one thread's ordered list of pages: page `i` holds positions `[i * page_size, (i + 1) * page_size)`. Tables
belong to the allocator; callers keep handles. `check()` proves `free + held + cached = usable`.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

TRASH_PAGE = 0


class OutOfPagesError(Exception):
    """An error: more pages were asked for than are free or cached. Nothing was changed."""


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """A copy of page `source` to page `target` that the device must make before either is written again."""

    source: int
    target: int


def root_key(policy_version: int) -> bytes:
    """Return the parent of every first block's key. Keys of different policy versions never meet."""
    return f"policy {policy_version}".encode()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the 128-bit name of a full page: its tokens and, by the parent's key, all tokens before and the policy."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(np.asarray(tokens, np.int32).tobytes())
    return digest.digest()


class PageAllocator:
    """The pages of one data shard."""

    def __init__(self, num_pages: int, page_size: int):
        """Make an allocator. Raise ValueError if no page is left beside the trash page."""
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: page {TRASH_PAGE} is reserved, so at least 2 are needed")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))
        self._refcounts = [0] * num_pages
        self._tables: dict[int, list[int]] = {}
        self._next_table = 0
        self._published: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """The pages that can be handed out now: free, or cached and not held."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_usable - self.num_available

    def pages(self, table: int) -> list[int]:
        """Return the table's pages. The list is the allocator's: read it, don't keep it."""
        return self._tables[table]

    def pages_for(self, length: int) -> int:
        """Count the pages that hold `length` tokens."""
        return -(-length // self.page_size)

    def missing(self, table: int, length: int) -> int:
        """Count the pages that `grow(table, length)` would take."""
        return max(0, self.pages_for(length) - len(self._tables[table]))

    def open(self) -> int:
        """Return a new, empty table."""
        table = self._next_table
        self._next_table += 1
        self._tables[table] = []
        return table

    def grow(self, table: int, length: int) -> None:
        """Make room for `length` tokens. Raises OutOfPagesError, and then takes nothing."""
        missing = self.missing(table, length)
        self._require(missing)
        self._tables[table].extend(self._take() for _ in range(missing))

    def truncate(self, table: int, length: int) -> None:
        """Drop the pages that hold only positions >= `length`."""
        pages = self._tables[table]
        keep = self.pages_for(length)
        for page in reversed(pages[keep:]):
            self._drop(page)
        del pages[keep:]

    def fork(self, table: int, length: int) -> tuple[int, PageCopy | None]:
        """Return a table of the first `length` tokens: full pages are shared, a partial last page is copied.

        Raises:
            ValueError: the table holds fewer than `length` tokens.
            OutOfPagesError: no page for the copy.
        """
        pages = self._tables[table]
        if self.pages_for(length) > len(pages):
            raise ValueError(f"cannot fork {length} tokens of a table with {len(pages)} pages of {self.page_size}")
        full, partial = divmod(length, self.page_size)
        self._require(1 if partial else 0)
        for page in pages[:full]:
            self._refcounts[page] += 1
        new = self.open()
        self._tables[new] = pages[:full]
        if not partial:
            return new, None
        target = self._take()
        self._tables[new].append(target)
        return new, PageCopy(pages[full], target)

    def make_writable(self, table: int, index: int) -> PageCopy | None:
        """Make page `index` of the table safe to write: shared with nobody, and no longer published.

        Returns the copy that the device must make first, if the page was shared. Raises OutOfPagesError.
        """
        pages = self._tables[table]
        page = pages[index]
        if self._refcounts[page] == 1:
            self._unpublish(page)
            return None
        self._require(1)
        pages[index] = self._take()
        self._drop(page)
        return PageCopy(page, pages[index])

    def free(self, table: int) -> None:
        """End a table. Its published pages stay cached while nobody needs the room."""
        self.truncate(table, 0)
        del self._tables[table]

    def publish(self, table: int, index: int, key: bytes) -> None:
        """Offer page `index`, whose contents are computed, to later tables. The first page under a key stays."""
        page = self._tables[table][index]
        if key not in self._published and page not in self._key_of:
            self._published[key] = page
            self._key_of[page] = key

    def adopt(self, table: int, index: int, key: bytes) -> bool:
        """Put the page published under `key`, if any, in place of page `index` (one past the last: appends it)."""
        page = self._published.get(key)
        if page is None:
            return False
        self._cached.pop(page, None)
        self._refcounts[page] += 1
        pages = self._tables[table]
        if index == len(pages):
            pages.append(page)
        else:
            self._drop(pages[index])
            pages[index] = page
        return True

    def forget_published(self) -> None:
        """Unpublish every page (a new policy): what was cached is free, what is held stays with its tables."""
        for page in list(self._key_of):
            self._unpublish(page)

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one state and refcounts equal table entries."""
        references = collections.Counter(page for pages in self._tables.values() for page in pages)
        held, cached, free = set(references), set(self._cached), set(self._free)
        assert len(self._free) == len(free), "a page is twice on the free list"
        assert TRASH_PAGE not in held | cached | free, "the trash page was handed out"
        assert not held & cached, "a held page is also cached"
        assert not held & free, "a held page is also free"
        assert not cached & free, "a cached page is also free"
        assert len(held) + len(cached) + len(free) == self.num_usable, "a page is lost"
        assert self._refcounts == [references[page] for page in range(self.num_pages)], "refcounts differ from tables"
        assert {page: key for key, page in self._published.items()} == self._key_of, "published pages disagree"
        assert cached <= set(self._key_of), "a cached page is not published"
        assert not free & set(self._key_of), "a free page is published"
        for pages in self._tables.values():
            assert len(pages) == len(set(pages)), "a table names a page twice"

    def _require(self, count: int) -> None:
        if count > self.num_available:
            raise OutOfPagesError(f"{count} pages needed, {self.num_available} available of {self.num_usable}")

    def _take(self) -> int:
        if not self._free:
            oldest = next(iter(self._cached))
            self._unpublish(oldest)
        page = self._free.pop()
        self._refcounts[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._refcounts[page] -= 1
        if self._refcounts[page]:
            return
        if page in self._key_of:
            self._cached[page] = None
        else:
            self._free.append(page)

    def _unpublish(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is None:
            return
        del self._published[key]
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)
