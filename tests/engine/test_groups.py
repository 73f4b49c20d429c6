"""Gang scheduling on the host alone: groups run whole or not at all, end, and change nobody's results."""

import random

import pytest

from apr_jax.engine.driver import Driver
from apr_jax.engine.limits import Limits
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.threads import Append, Decode, Join, Open, RolloutKey, Share, Spawn
from tests.engine.simulated import SimulatedDevice

STOP = 0


def worker(rng):
    thread = yield Open([rng.randint(1, 9) for _ in range(rng.randint(1, 6))])
    yield Decode(thread, (STOP,), max_tokens=rng.randint(1, 30))
    return tuple(thread.tokens)


def searching(seed, depth=2):
    """Threads that spawn, share and join, with or without a success that cuts the others off."""
    rng = random.Random(seed)
    thread = yield Open([rng.randint(1, 9) for _ in range(rng.randint(1, 20))])
    for turn in range(2):
        yield Decode(thread, (STOP,), max_tokens=8)
        success = (lambda value: sum(value) % 3 == 0) if rng.random() < 0.5 else None
        if rng.random() < 0.6:
            workers = [worker(random.Random(f"{seed} {turn} {n}")) for n in range(rng.randint(1, 3))]
            handle = yield Share(thread.tokens[:12], workers)
        elif depth:
            handle = yield Spawn([searching(f"{seed} {turn} {n}", depth - 1) for n in range(rng.randint(1, 2))])
        else:
            continue
        values = yield Join(handle, success)
        yield Append(thread, [1 + sum(value) % 9 for value in values if value is not None])
    return tuple(thread.tokens)


def draws(limits):
    """What a thread writes next: a function of what it is and how much it holds."""

    def draw(thread, place):
        room = min(thread.max_generated - thread.generated, thread.max_length - len(thread.tokens))
        written = []
        while len(written) < min(room, limits.steps_per_visit) and STOP not in written:
            written.append(random.Random(f"{thread.key} {thread.generated + len(written)}").randint(0, 11))
        return written

    return draw


def run(programs, limits):
    """All results, how often a group was admitted beside others, and preemptions; groups are checked at each visit."""
    scheduler = Scheduler(limits)
    how = {"seed": 0, "max_steps": 60, "max_total_tokens": 10**6}
    todo = [(RolloutKey(index, 0), program) for index, program in enumerate(programs)]
    running = Driver(todo, scheduler, now=lambda: 0.0, **how)
    device, together = SimulatedDevice(scheduler), 0
    while True:
        scheduler.admit(running.start_next)
        scheduler.check()
        if not scheduler.num_running:
            break
        for shard in range(limits.num_shards):
            lanes = scheduler.running(shard)
            groups = scheduler.groups(shard)
            together += bool(groups) and any(thread.group is None for thread in lanes)
            assert len(groups) <= limits.max_groups
            holders = {thread.group for thread in scheduler.cache.holders[shard] if thread.group is not None}
            assert holders == set(groups), "pages without lanes"
            for group in groups:
                assert all(each in lanes for each in group.workers), "half a group"
                living = [each for each in group.workers if each not in group.stopped]
                assert len({each.generated for each in living}) == 1, "out of step"
        device.copy()
        device.prefill()
        for thread, tokens in device.decode(draws(limits)):
            running.decoded(thread, tokens, [0.0] * len(tokens))
        running.drain()
        running.check()
        scheduler.check()
    assert all(allocator.num_held == 0 for allocator in scheduler.cache.allocators)
    return running.results(), together, scheduler.preemptions


def counts(rollout):
    return rollout.result, rollout.generated_tokens, rollout.sequential_tokens, rollout.peak_context


def limits(**changes):
    sizes = {"lanes": 6, "pages": 28, "page_size": 4, "steps_per_visit": 5, "prefill_lanes": 2, "prefix_reuse": True}
    rest = {"decode_attention": "xla", "page_dtype": "compute", "num_shards": 1, "max_seq_len": 64, "max_workers": 3}
    return Limits(**sizes | rest | changes)


@pytest.mark.parametrize("shards", [1, 2])
def test_groups_run_whole_and_results_do_not_depend_on_the_schedule(shards):
    preempted = beside = 0
    for seed in range(12):
        (alone,), _, _ = run([searching(f"{seed} 0")], limits(lanes=64, pages=5000))
        programs = [searching(f"{seed} {key}") for key in range(5)]
        rollouts, together, preemptions = run(programs, limits(num_shards=shards))
        roomy, _, _ = run([searching(f"{seed} {key}") for key in range(5)], limits(lanes=64, pages=5000))
        assert [counts(rollout) for rollout in rollouts] == [counts(rollout) for rollout in roomy]
        assert counts(rollouts[0]) == counts(alone)
        preempted += preemptions
        beside += together
    assert preempted > 10
    assert beside > 10
