"""No thread waits forever, and how long one may wait is bounded by what goes before it."""

import dataclasses
import heapq

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.threads import Decode, Join, Open, Spawn, Status
from tests.engine.test_programs import MAX_LEN, WIDE, StandIn, leaf, schedules, shapes, tree


@dataclasses.dataclass
class Wait:
    """One Decode's wait for a lane."""

    path: tuple[int, ...]
    rollout: int
    visits: int = 0  # that it was passed over in
    before: set[object] = dataclasses.field(default_factory=set)  # Decodes that went before it in the meantime
    foreign: int = 0  # of them, those of other rollouts, counted each visit


class Watched(StandIn):
    """Holds the scheduler's order at each admission, and notes how long every Decode waits."""

    def __init__(self, limits, programs, **changes):
        super().__init__(limits, programs, **changes)
        self.waits = {}
        self.running_before = set()
        start_next = self.run.start_next

        def start():
            assert not self.ready(), "a root program starts while a thread waits for a lane"
            return start_next()

        self.run.start_next = start

    def ready(self):
        return [thread for *_, thread in self.scheduler._ready if thread.turn.status is Status.READY]

    def running(self):
        return [t for shard in range(self.scheduler.limits.num_shards) for t in self.scheduler.running(shard)]

    def call(self, thread):
        return self.run._node_of[thread].call

    def visit(self, half=0):
        ready, running = self.ready(), self.running()
        assert running or half, "threads want to decode and none may"
        first = min((thread.priority for thread in ready), default=None)
        for thread in running:
            admitted = self.call(thread) not in self.running_before
            assert not (admitted and first is not None and thread.priority > first), "admitted past one that waits"
        self.running_before = {self.call(thread) for thread in running}
        for thread in ready:
            wait = self.waits.setdefault(self.call(thread), Wait(thread.path, thread.rollout))
            ahead = [other for other in (*ready, *running) if other.priority < thread.priority]
            wait.visits += 1
            wait.before |= {self.call(other) for other in ahead}
            wait.foreign += sum(other.rollout != thread.rollout for other in ahead)
        super().visit(half)

    def check_bound(self):
        """A Decode takes at most V visits; one that waits is passed over by no more than V for each that goes first.

        Visits of the other half count as well.
        """
        limits = self.scheduler.limits
        longest = limits.halves * -(-min(self.max_steps, limits.max_seq_len - 1) // limits.steps_per_visit)
        for wait in self.waits.values():
            assert wait.visits <= longest * (1 + len(wait.before)), wait
        return max((wait.visits for wait in self.waits.values()), default=0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(shapes, st.integers(1, 30)), min_size=1, max_size=8), schedules, st.booleans())
def test_every_rollout_ends_and_waits_are_bounded(trees, limits, cancel):
    machine = Watched(limits, [tree(shape, length, cancel) for shape, length in trees])
    assert len(machine.finish()) == len(trees)
    machine.check_bound()
    # The first unfinished rollout waits for its own threads only.
    assert all(wait.foreign == 0 for wait in machine.waits.values() if wait.rollout == 0)


def test_the_bound_is_met_under_pressure():
    """Many wide rollouts, one lane and one thread's pages: long waits, within the bound, and in order of rollouts."""
    limits = dataclasses.replace(WIDE, lanes=2, pages=11, steps_per_visit=2)
    machine = Watched(limits, [tree([[[], [[]], []]] * 2, 9, False) for _ in range(12)])
    assert len(machine.finish()) == 12
    assert machine.check_bound() > 20
    assert machine.scheduler.preemptions > 20


def test_children_go_before_new_parents():
    """With one lane, a rollout's children have all ended before the next rollout's parent is even opened."""
    order = []

    def parent(number):
        order.append(number)
        thread = yield Open([2, 2])
        yield Decode(thread, ())
        yield Join((yield Spawn([noted(number, child) for child in range(3)])))

    def noted(number, child):
        yield from leaf(MAX_LEN - 5)
        order.append((number, child))

    machine = Watched(dataclasses.replace(WIDE, lanes=1), [parent(number) for number in range(4)])
    machine.finish()
    assert order == [each for number in range(4) for each in (number, (number, 0), (number, 1), (number, 2))]


def test_a_queue_without_priorities_is_found_out(monkeypatch):
    """The counterexample: first come, first served."""

    def push(scheduler, thread):
        scheduler._tickets += 1
        heapq.heappush(scheduler._ready, ((scheduler._tickets, 0, ()), scheduler._tickets, thread))

    monkeypatch.setattr(Scheduler, "_push", push)
    limits = dataclasses.replace(WIDE, lanes=2, pages=15, steps_per_visit=2)
    with pytest.raises(AssertionError, match="past one that waits"):
        Watched(limits, [tree([[[], [[]], []]] * 2, 9, False) for _ in range(12)]).finish()
