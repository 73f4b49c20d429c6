"""The page allocator against a plain model: a table is a list of tokens, and its pages hold what was written."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apr_jax.engine.pages import TRASH_PAGE, OutOfPagesError, PageAllocator, block_key, root_key

PAGE = 4


class PagesMachine(RuleBasedStateMachine):
    """Random operations. `memory` is the device: a write to a page that others read would show as wrong tokens."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(num_pages=10, page_size=PAGE)
        self.memory = {page: [None] * PAGE for page in range(10)}
        self.threads: dict[int, list[int]] = {}
        self.version = 0

    def read(self, table, length):
        pages = self.allocator.pages(table)
        return [self.memory[pages[i // PAGE]][i % PAGE] for i in range(length)]

    def copy(self, copy):
        if copy is not None:
            self.memory[copy.target] = list(self.memory[copy.source])

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.threads)))

    @rule()
    def open(self):
        self.threads[self.allocator.open()] = []

    @precondition(lambda self: self.threads)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def append(self, data, tokens):
        """Writes tokens as the engine does: the first written page made its own, the rest new."""
        table = self.pick(data)
        written = self.threads[table]
        before = list(self.allocator.pages(table))
        try:
            if len(written) // PAGE < len(before):
                self.copy(self.allocator.make_writable(table, len(written) // PAGE))
            before = list(self.allocator.pages(table))
            self.allocator.grow(table, len(written) + len(tokens))
        except OutOfPagesError:
            assert self.allocator.pages(table) == before, "a refused growth took pages"
            return
        for offset, token in enumerate(tokens, start=len(written)):
            self.memory[self.allocator.pages(table)[offset // PAGE]][offset % PAGE] = token
        written.extend(tokens)

    @precondition(lambda self: self.threads)
    @rule(data=st.data())
    def truncate(self, data):
        table = self.pick(data)
        length = data.draw(st.integers(0, len(self.threads[table])))
        self.allocator.truncate(table, length)
        del self.threads[table][length:]

    @precondition(lambda self: self.threads)
    @rule(data=st.data())
    def fork(self, data):
        table = self.pick(data)
        length = data.draw(st.integers(0, len(self.threads[table])))
        try:
            new, copy = self.allocator.fork(table, length)
        except OutOfPagesError:
            return
        self.copy(copy)
        self.threads[new] = self.threads[table][:length]

    @precondition(lambda self: self.threads)
    @rule(data=st.data())
    def free(self, data):
        table = self.pick(data)
        self.allocator.free(table)
        del self.threads[table]

    def keys(self, tokens):
        key, keys = root_key(self.version), []
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            key = block_key(key, tokens[start : start + PAGE])
            keys.append(key)
        return keys

    @precondition(lambda self: self.threads)
    @rule(data=st.data())
    def publish(self, data):
        table = self.pick(data)
        for index, key in enumerate(self.keys(self.threads[table])):
            self.allocator.publish(table, index, key)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=PAGE, max_size=3 * PAGE))
    def open_with_prefix(self, tokens):
        """A new thread adopts what it can of its prompt; what it adopted must read as the prompt's tokens."""
        table = self.allocator.open()
        adopted = 0
        for index, key in enumerate(self.keys(tokens)):
            if not self.allocator.adopt(table, index, key):
                break
            adopted += PAGE
        self.threads[table] = tokens[:adopted]

    @rule()
    def new_policy(self):
        self.version += 1
        self.allocator.forget_published()
        assert self.allocator.num_available == len(self.allocator._free)

    @invariant()
    def contents_and_books_agree(self):
        self.allocator.check()
        for table, tokens in self.threads.items():
            assert self.read(table, len(tokens)) == tokens


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


def test_check_fires_on_a_lost_page_and_on_a_wrong_refcount():
    allocator = PageAllocator(6, PAGE)
    table = allocator.open()
    allocator.grow(table, 5)
    allocator._refcounts[allocator.pages(table)[0]] += 1
    with pytest.raises(AssertionError, match="refcounts"):
        allocator.check()
    allocator._refcounts[allocator.pages(table)[0]] -= 1
    allocator._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        allocator.check()


def test_the_trash_page_is_never_handed_out():
    allocator = PageAllocator(4, PAGE)
    table = allocator.open()
    allocator.grow(table, 3 * PAGE)
    assert TRASH_PAGE not in allocator.pages(table)
    with pytest.raises(OutOfPagesError, match="1 pages needed, 0 available of 3"):
        allocator.grow(table, 3 * PAGE + 1)


def test_cached_pages_are_evicted_oldest_first():
    allocator = PageAllocator(4, PAGE)
    keys = [block_key(root_key(0), [number] * PAGE) for number in range(2)]
    for key in keys:
        table = allocator.open()
        allocator.grow(table, PAGE)
        allocator.publish(table, 0, key)
        allocator.free(table)
    table = allocator.open()
    allocator.grow(table, 2 * PAGE)
    adopter = allocator.open()
    assert not allocator.adopt(adopter, 0, keys[0])
    assert allocator.adopt(adopter, 0, keys[1])


def test_keys_tell_policies_parents_and_tokens_apart():
    keys = {block_key(root_key(version), tokens) for version in (0, 1) for tokens in ([1, 2], [2, 1], [1, 2, 0])}
    keys |= {block_key(block_key(root_key(0), [1, 2]), [1, 2])}
    assert len(keys) == 7
