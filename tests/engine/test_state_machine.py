"""Ten thousand random operations on scheduler, allocator and cache, held to a plain model after each of them.

The model is a list of tokens per thread. Every page that a thread counts as computed must hold exactly its tokens at
their positions under the current weights, every published page what its key says, and what a thread writes (a function
of what its pages hold) must be what the model's tokens give.
"""

import collections

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from apr_jax.engine.limits import Limits
from apr_jax.engine.pages import PageAllocator, block_key, root_key
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.thread_cache import ThreadCache
from apr_jax.engine.threads import Status, Thread
from tests.engine.simulated import SimulatedDevice, chain, follow

PAGE, MAX_LEN, MAX_STEPS = 4, 40, 30
PROMPTS = [[(n * n + family) % 7 for n in range(MAX_LEN)] for family in range(3)]  # threads of a family begin alike
STOP = 0
LIVE = (Status.IDLE, Status.READY, Status.RUNNING, Status.WAITING_ON_CHILDREN)

counts: collections.Counter[str] = collections.Counter()


def successor(number: int) -> int:
    """The token that follows a cache whose last number this is."""
    return number % 9


class CacheMachine(RuleBasedStateMachine):
    """Threads as programs use them. `model` says what tokens each thread has."""

    @initialize(
        shards=st.integers(1, 2),
        lanes=st.sampled_from([1, 2, 4, 6]),
        pages=st.integers(11, 20),
        steps=st.integers(1, 6),
        prefill_lanes=st.integers(1, 3),
        reuse=st.sampled_from([True, True, True, False]),
        halves=st.integers(1, 2),
    )
    def build(self, shards, lanes, pages, steps, prefill_lanes, reuse, halves):
        limits = Limits(
            num_shards=shards,
            lanes=lanes,
            pages=pages,
            page_size=PAGE,
            max_seq_len=MAX_LEN,
            steps_per_visit=steps,
            prefill_lanes=prefill_lanes,
            decode_attention="xla",
            page_dtype="compute",
            prefix_reuse=reuse,
            halves=halves,
        )
        self.half = 0  # that is visited next
        self.in_flight: list[list[tuple[Thread, list[int]]]] = [[] for _ in range(halves)]
        self.scheduler = Scheduler(limits)
        self.device = SimulatedDevice(self.scheduler)
        self.model: dict[Thread, list[int]] = {}
        self.children: dict[Thread, list[Thread]] = {}
        self.rollouts = 0
        self.since_policy = 0

    def threads(self, *statuses):
        return [thread for thread in self.model if thread.turn.status in (statuses or LIVE)]

    def pick(self, data, *statuses):
        return data.draw(st.sampled_from(self.threads(*statuses)))

    def subtree(self, thread):
        return [thread, *(each for child in self.children[thread] for each in self.subtree(child))]

    def add(self, thread):
        self.model[thread] = list(thread.tokens)
        self.children[thread] = []

    def end(self, thread):
        for each in self.subtree(thread):
            self.scheduler.release(each)
            self.model.pop(each, None)

    @precondition(lambda self: len(self.model) < 12)
    @rule(family=st.integers(0, 2), length=st.sampled_from(range(1, MAX_LEN)))
    def open(self, family, length):
        counts["open"] += 1
        self.add(Thread((), PROMPTS[family][:length], self.rollouts, (0, 0)))
        self.rollouts += 1

    @precondition(lambda self: self.threads() and len(self.model) < 16)
    @rule(data=st.data(), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), waits=st.booleans())
    def fork(self, data, sizes, waits):
        """Children that begin with all their parent's tokens. An idle parent may wait for them or go on beside them."""
        parent = self.pick(data)
        ordinal = len(self.children[parent])
        for number, size in enumerate(sizes):
            tokens = [*parent.tokens, *(3 + n % 3 for n in range(size))]
            if len(tokens) < MAX_LEN:
                counts["fork"] += 1
                child = Thread((*parent.path, ordinal, number), tokens, parent.rollout, (0, 0))
                self.scheduler.cache.fork(parent, child)
                self.children[parent].append(child)
                self.add(child)
        if waits and parent.turn.status is Status.IDLE and self.children[parent]:
            self.scheduler.wait_for_children(parent)

    @precondition(lambda self: any(self.can_decode(thread) for thread in self.threads(Status.IDLE)))
    @rule(data=st.data(), visits=st.integers(0, 4))
    def decode(self, data, visits):
        """Idle threads ask to decode, and some visits go by."""
        ready = [thread for thread in self.threads(Status.IDLE) if self.can_decode(thread)]
        for thread in data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=6, unique_by=id)):
            counts["decode"] += 1
            self.scheduler.submit(thread)
        for _ in range(visits):
            if self.threads(Status.READY, Status.RUNNING):
                self.visit()

    def can_decode(self, thread):
        return len(thread.tokens) < MAX_LEN and thread.generated < MAX_STEPS

    @precondition(lambda self: self.threads(Status.IDLE))
    @rule(data=st.data())
    def truncate(self, data):
        counts["truncate"] += 1
        thread = self.pick(data, Status.IDLE)
        self.cut(thread, data.draw(st.integers(1, len(thread.tokens))))

    def cut(self, thread, length):
        del thread.tokens[length:]
        self.scheduler.cache.truncate(thread, length)
        del self.model[thread][length:]

    @precondition(lambda self: self.threads(Status.IDLE))
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 6), min_size=1, max_size=9))
    def append(self, data, tokens):
        counts["append"] += 1
        self.extend(self.pick(data, Status.IDLE), tokens)

    def extend(self, thread, tokens):
        room = MAX_LEN - len(thread.tokens)
        thread.tokens.extend(tokens[:room])
        self.model[thread].extend(tokens[:room])

    @precondition(lambda self: any(self.children[t] for t in self.threads(Status.IDLE, Status.WAITING_ON_CHILDREN)))
    @rule(data=st.data(), keep=st.integers(1, MAX_LEN), tokens=st.lists(st.integers(0, 6), max_size=6))
    def join(self, data, keep, tokens):
        """Ends all below a thread; the thread is cut back, takes what was joined, and goes on."""
        counts["join"] += 1
        parents = [t for t in self.threads(Status.IDLE, Status.WAITING_ON_CHILDREN) if self.children[t]]
        parent = data.draw(st.sampled_from(parents))
        for child in self.children[parent]:
            self.end(child)
        self.children[parent] = []
        self.scheduler.resume(parent)
        self.cut(parent, min(keep, len(parent.tokens)))
        self.extend(parent, tokens)

    @precondition(lambda self: len(self.threads()) > 6)
    @rule(data=st.data())
    def cancel(self, data):
        """Ends a thread and all below it, whatever they do; what they alone held is available at once."""
        counts["cancel"] += 1
        thread = self.pick(data)
        doomed = [each for each in self.subtree(thread) if each.turn.status is not Status.DONE]
        held = [allocator.num_held for allocator in self.scheduler.cache.allocators]
        alone = [len(self.held_alone(shard, doomed)) for shard in range(len(held))]
        self.end(thread)
        assert [allocator.num_held for allocator in self.scheduler.cache.allocators] == [
            before - freed for before, freed in zip(held, alone, strict=True)
        ]

    def held_alone(self, shard, threads):
        """The pages that these threads hold and no other thread does."""
        allocator = self.scheduler.cache.allocators[shard]
        holders = list(self.scheduler.cache.holders[shard])
        ours = {page for t in holders if t in threads for page in allocator.pages(t.cached.table)}
        return ours - {page for t in holders if t not in threads for page in allocator.pages(t.cached.table)}

    @precondition(lambda self: self.since_policy > 40)
    @rule()
    def new_policy(self):
        """A run ends and the weights change. What is published now holds numbers of the old weights."""
        counts["new policy"] += 1
        for thread in list(self.model):
            if thread in self.model:
                self.end(thread)
        self.scheduler.cache.new_policy()
        self.device.version += 1
        self.since_policy = 0

    @precondition(lambda self: self.threads(Status.READY, Status.RUNNING))
    @rule()
    def visit(self):
        """Admission, copies, prefill and a decode chunk; threads that stopped are idle again.

        With two halves the tokens of one come when the other one's chunk is on its way, whatever happened meanwhile.
        """
        counts["visit"] += 1
        preempted = self.scheduler.preemptions
        half, self.half = self.half, (self.half + 1) % len(self.in_flight)
        self.scheduler.admit(lambda: False, half)
        counts["preempt"] += self.scheduler.preemptions - preempted
        if half == 0 and not self.scheduler.num_running:
            self.waits_for_idle_threads()
        self.scheduler.check()
        self.device.copy()
        self.device.prefill()
        self.in_flight[half] = self.device.decode(self.draw, half)
        landed, self.in_flight[self.half] = self.in_flight[self.half], []
        for thread, tokens in landed:
            if not self.scheduler.keeps(thread, self.half):
                counts["dropped"] += 1
                continue
            assert thread in self.model, "a thread that has ended got tokens"
            assert tokens == self.predict(thread, len(tokens))
            self.scheduler.cache.decoded(thread, len(tokens), len(tokens))
            thread.tokens.extend(tokens)
            thread.generated += len(tokens)
            self.model[thread].extend(tokens)
            if tokens[-1] == STOP or not self.can_decode(thread):
                self.scheduler.leave_lane(thread)

    def waits_for_idle_threads(self):
        """Nobody may decode: only because threads that go first hold pages and ask for nothing (no program does so)."""
        first = min(thread.priority for thread in self.threads(Status.READY))
        holders = [thread for holders in self.scheduler.cache.holders for thread in holders]
        assert any(thread.priority < first and thread.turn.status is not Status.READY for thread in holders)

    def draw(self, thread, place):
        """Up to a chunk of tokens, each a function of the numbers in the thread's pages."""
        limits, tokens = self.scheduler.limits, []
        for _ in range(min(limits.steps_per_visit, MAX_STEPS - thread.generated, MAX_LEN - len(thread.tokens))):
            tokens.append(successor(place.number))
            if tokens[-1] == STOP:
                break
            place = follow(place, tokens[-1], alone=False)
        return tokens

    def predict(self, thread, count):
        tokens = list(self.model[thread])
        for _ in range(count):
            tokens.append(successor(chain(self.device.version, tokens)[-1]))
        return tokens[-count:]

    @invariant()
    def everything_agrees(self):
        if not hasattr(self, "scheduler"):
            return
        self.since_policy += 1
        self.scheduler.check()
        for thread, tokens in self.model.items():
            assert thread.tokens == tokens
            assert thread.cached.computed < len(tokens)
            if thread.cached.table is not None:
                row = self.device.row(thread, after_copies=True)
                assert [place.number for place in row] == chain(self.device.version, tokens[: thread.cached.computed])
                assert thread.cached.block_keys == self.keys(tokens)[: len(thread.cached.block_keys)]
                assert all(place.alone for place in row[: len(thread.cached.block_keys) * PAGE]), (
                    "decoded, and to be shared"
                )
        waiting = {thread for *_, thread in self.scheduler._ready if thread.turn.status is Status.READY}
        assert waiting == set(self.threads(Status.READY)), "a thread is lost, or stands twice"
        self.published_pages_hold_what_their_keys_say()

    def published_pages_hold_what_their_keys_say(self):
        for shard, allocator in enumerate(self.scheduler.cache.allocators):
            for page, key in allocator._key_of.items():
                version, tokens = self.device.published[key]
                assert version == self.device.version, "a page of old weights may be adopted"
                assert key == self.keys(tokens)[-1]
                places = self.device.memory[shard][page]
                assert [place.number for place in places] == chain(version, tokens)[-PAGE:]
                assert all(place.alone for place in places)

    def keys(self, tokens):
        key, keys = root_key(self.scheduler.cache._policy_version), []
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            key = block_key(key, tokens[start : start + PAGE])
            keys.append(key)
        return keys

    def teardown(self):
        if hasattr(self, "scheduler"):
            counts["copies"] += self.device.copies
            counts["reused"] += self.scheduler.cache.reused_tokens
            for thread in list(self.model):
                if thread in self.model:
                    self.end(thread)
            assert all(allocator.num_held == 0 for allocator in self.scheduler.cache.allocators), (
                "pages outlive their threads"
            )


def profile(max_examples):
    """Fixed: the same operations in every run."""
    return settings(
        derandomize=True,
        max_examples=max_examples,
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )


OPERATIONS = ("open", "fork", "decode", "truncate", "append", "join", "cancel")


def test_ten_thousand_operations():
    counts.clear()
    run_state_machine_as_test(CacheMachine, settings=profile(160))
    assert sum(counts[name] for name in OPERATIONS) >= 10_000
    for name in (*OPERATIONS, "visit", "new policy", "preempt", "copies", "reused", "dropped"):
        assert counts[name] >= 50, f"{name}: {counts[name]}"


def no_copy_on_write(allocator, table, index):
    """Writes to a page that others hold."""
    return None


def no_new_pages_after_a_cut(cache, thread, length):
    """Forgets that the pages' keys named what was cut off."""
    thread.cached.computed = min(thread.cached.computed, length - 1)
    if thread.cached.table is not None:
        cache.allocators[thread.cached.shard].truncate(thread.cached.table, length)


def no_new_keys(cache):
    """Goes on with pages of the old weights."""


def no_copies(cache):
    """Loses the copies of forked pages."""
    return [[] for _ in cache._copies]


def keep_published(allocator, page, unpublish=PageAllocator._unpublish):
    """Leaves a held page that is to be written on offer."""
    if page in allocator._cached:
        unpublish(allocator, page)


def keep_all(scheduler, thread, half):
    """Hands out what was decoded for a thread that has lost its lane since."""
    return True


def lose_preempted(scheduler, thread):
    """Takes a thread's pages and lane and does not put it back in the queue."""
    scheduler.preemptions += 1
    scheduler.cache.free(thread)
    if thread.turn.status is Status.RUNNING:
        scheduler._clear_lane(thread)
        thread.turn.status = Status.READY


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (PageAllocator, "make_writable", no_copy_on_write),
        (PageAllocator, "_unpublish", keep_published),
        (ThreadCache, "truncate", no_new_pages_after_a_cut),
        (ThreadCache, "new_policy", no_new_keys),
        (ThreadCache, "take_copies", no_copies),
        (Scheduler, "_preempt", lose_preempted),
        (Scheduler, "keeps", keep_all),
    ],
)
def test_the_machine_finds_seeded_faults(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CacheMachine, settings=profile(60))
