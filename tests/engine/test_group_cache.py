"""Workers on a shared cache: what the engine computes is what the views say, whatever the schedule, lanes and mesh."""

import jax
import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.engine.threads import Append, Decode, Join, Open, RolloutKey, Share, Spawn, StopReason, Truncate
from tests.engine.group_naive import naive_logprobs
from tests.engine.helpers import (
    BANNED,
    MODEL,
    assert_close,
    assert_same_bits,
    keyed,
    make_engine,
    make_mesh,
    make_params,
    plain,
    prompt,
    searching,
)
from tests.engine.hlo import collectives_over_data, programs_of, text_of

pytestmark = pytest.mark.heavy

HEADERS = (2, 5, 1)


def worker(seed, header, stop_tokens=(7,), max_tokens=None):
    thread = yield Open(prompt(seed, header))
    stop = yield Decode(thread, stop_tokens, max_tokens=max_tokens)
    return stop.reason, list(thread.tokens)


def sharing(seed, length=10, headers=HEADERS, stops=((1, 2, 3), (), ()), limits=(5, 19, None), success=None):
    """A root without a thread of its own, whose workers share a cache."""
    workers = [
        worker(seed + 100 * number, header, stop, limit)
        for number, (header, stop, limit) in enumerate(zip(headers, stops, limits, strict=True))
    ]
    handle = yield Share(prompt(seed, length), workers)
    return (yield Join(handle, success))


@pytest.fixture(scope="module")
def engine():
    return make_engine(max_workers=3)


def assert_equals_naive(rollout, *, greedy=False, atol=1e-5):
    """Log-probabilities of every written token; where greedy, each is the best but for ties."""
    expected = naive_logprobs(MODEL, make_params(), rollout.calls, BANNED)
    for call, logprobs in zip(rollout.calls, expected, strict=True):
        drawn = logprobs[np.arange(len(call.tokens)), call.tokens]
        np.testing.assert_allclose(call.logprobs, drawn, atol=atol)
        if greedy:
            assert (drawn > logprobs.max(axis=1) - 1e-4).all()


@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_tokens_and_logprobs_are_those_of_dense_attention_to_written_out_views(engine, seed):
    (rollout,) = engine.run(keyed([sharing(seed)]), seed=0, temperature=0.0)
    lengths = [len(call.tokens) for call in rollout.calls]
    assert len(lengths) == 3
    assert len(set(lengths)) == 3, "workers end at different times, one in its first chunk"
    assert max(lengths) > 2 * 8, "several chunks"
    assert_equals_naive(rollout, greedy=True)


def test_sampled_logprobs_and_a_prompt_that_ends_inside_a_block(engine):
    rollouts = engine.run(keyed([sharing(seed, length=61 + seed) for seed in (3, 4)]), seed=1, temperature=1.0)
    for rollout in rollouts:
        assert_equals_naive(rollout)


def test_the_others_tokens_matter(engine):
    """A worker's first draw sees the other's header already."""

    def first_call(headers):
        program = sharing(9, headers=headers, stops=((),) * len(headers), limits=(20,) * len(headers))
        return engine.run(keyed([program]), seed=0, temperature=0.0)[0].calls[0]

    alone, together = first_call((4,)), first_call((4, 3))
    assert alone.context.tolist() == together.context.tolist()
    assert abs(alone.logprobs[0] - together.logprobs[0]) > 1e-3


def test_a_worker_without_others_is_an_ordinary_thread(engine):
    alone = engine.run(keyed([sharing(5, headers=(6,), stops=((7,),), limits=(None,))]), seed=0, temperature=0.0)[0]

    def ordinary():
        thread = yield Open([*prompt(5, 10), *prompt(5, 6)])
        yield Decode(thread, (7,))

    (thread,) = engine.run(keyed([ordinary()]), seed=0, temperature=0.0)
    np.testing.assert_array_equal(alone.calls[0].tokens, thread.calls[0].tokens)
    np.testing.assert_allclose(alone.calls[0].logprobs, thread.calls[0].logprobs, atol=1e-5)


def crowd(target):
    return [
        sharing(21),
        searching(1, depth=2),
        plain(4),
        target,
        sharing(22, headers=(3, 2), stops=((), (1, 2, 3)), limits=(9, None)),
        plain(6, length=90),
        sharing(23, length=30),
    ]


def test_bits_do_not_depend_on_neighbours_and_lane_widths_agree(engine):
    alone = engine.run([(RolloutKey(3, 0), sharing(8))], seed=5, temperature=1.0)[0]
    crowded = engine.run(keyed(crowd(sharing(8))), seed=5, temperature=1.0)
    assert_same_bits(alone, crowded[3])
    narrow = make_engine(max_workers=3, lanes=3, prefill_lanes=1, pages=37).run(
        keyed(crowd(sharing(8))), seed=5, temperature=1.0
    )
    for one, other in zip(crowded, narrow, strict=True):
        assert_close(one, other)
        assert one.result == other.result


def test_chunk_lengths_change_nothing(engine):
    expected = engine.run(keyed([sharing(8)]), seed=5, temperature=1.0)[0]
    for steps in (1, 5):
        other = make_engine(max_workers=3, steps_per_visit=steps).run(keyed([sharing(8)]), seed=5, temperature=1.0)[0]
        assert_close(expected, other)


def test_a_small_cache_runs_every_group_whole_and_takes_pages_of_others(engine):
    programs = lambda: [sharing(seed) for seed in range(31, 35)] + [searching(1, depth=2), sharing(35)]  # noqa: E731
    expected = engine.run(keyed(programs()), seed=2, temperature=1.0)
    small = make_engine(max_workers=3, pages=1 + 3 * 12)
    rollouts = small.run(keyed(programs()), seed=2, temperature=1.0)
    small._scheduler.check()
    assert all(allocator.num_held == 0 for allocator in small._scheduler.cache.allocators)
    for one, other in zip(expected, rollouts, strict=True):
        assert_close(one, other)


def test_a_mesh_changes_nothing(engine):
    expected = engine.run(keyed(crowd(sharing(8))), seed=4, temperature=1.0)
    mesh = make_mesh(data=2, tensor=2)
    sharded = make_engine(mesh, max_workers=3, lanes=8, pages=97, prefill_lanes=4)
    rollouts = sharded.run(keyed(crowd(sharing(8))), seed=4, temperature=1.0)
    for one, other in zip(expected, rollouts, strict=True):
        assert_close(one, other)
    assert collectives_over_data(text_of(*programs_of(sharded)["decode_groups"]), mesh) == []


def test_a_platforms_kernels_and_xla_give_the_same(engine):
    expected = engine.run(keyed([sharing(8)]), seed=5, temperature=1.0)[0]
    kernels = make_engine(max_workers=3, decode_attention="auto").run(keyed([sharing(8)]), seed=5, temperature=1.0)[0]
    assert_close(expected, kernels)


def test_the_clock_counts_lockstep_steps_once_and_a_success_cuts_the_others(engine):
    (free,) = engine.run(keyed([sharing(8, stops=((),) * 3, limits=(5, 19, 11))]), seed=0, temperature=1.0)
    assert [len(call.tokens) for call in free.calls] == [5, 19, 11]
    assert free.sequential_tokens == 19
    assert {call.clock_start for call in free.calls} == {0}
    assert all(call.group_prompt == 10 for call in free.calls)
    (cut,) = engine.run(
        keyed([sharing(8, stops=((),) * 3, limits=(5, 19, 11), success=lambda value: len(value[1]) == 10 + 1 + 11)]),
        seed=0,
        temperature=1.0,
    )
    assert [len(call.tokens) for call in cut.calls] == [5, 11, 11]
    assert cut.sequential_tokens == 11
    assert cut.calls[1].stop.reason is StopReason.CANCELLED
    assert [value is None for value in cut.result] == [False, True, False]
    engine._scheduler.check()
    assert engine._scheduler.num_running == 0
    assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)


def test_workers_that_cannot_decode_are_no_part_of_the_cache(engine):
    """One is full from the start, one ends without a Decode; the third is as if alone."""

    def idle():
        yield Open([1])
        return "nothing"

    def root():
        workers = [worker(1, 86), idle(), worker(5, 6, (), 12)]
        handle = yield Share(prompt(5, 10), workers)
        return (yield Join(handle))

    (rollout,) = engine.run(keyed([root()]), seed=0, temperature=0.0)
    assert rollout.result[0][0] is StopReason.LENGTH
    assert rollout.result[1] == "nothing"
    (alone,) = engine.run(keyed([sharing(5, headers=(6,), stops=((),), limits=(12,))]), seed=0, temperature=0.0)
    np.testing.assert_array_equal(rollout.calls[0].tokens, alone.calls[0].tokens)


def nested():
    """A parent with a thread of its own, that shares twice, inside a spawn."""

    def parent(seed):
        thread = yield Open(prompt(seed, 6))
        yield Decode(thread, (1, 2, 3, 4))
        for turn in range(2):
            handle = yield Share(thread.tokens, [worker(seed + turn + n, 2, (7,), 9 + n) for n in range(2)])
            values = yield Join(handle)
            yield Append(thread, [tokens[-1] for _, tokens in values])
            yield Decode(thread, (), max_tokens=3)
        return list(thread.tokens)

    handle = yield Spawn([parent(seed) for seed in (41, 51)])
    return (yield Join(handle))


def test_sharing_nests_in_spawns(engine):
    (rollout,) = engine.run(keyed([nested()]), seed=0, temperature=1.0)
    (again,) = make_engine(max_workers=2, lanes=2, pages=1 + 2 * 12).run(keyed([nested()]), seed=0, temperature=1.0)
    assert_close(rollout, again)
    assert rollout.result == again.result
    paths = {call.path[:4] for call in rollout.calls if call.group_prompt}
    assert len(paths) == 2 * 2 * 2


def test_warm_up_compiles_the_shared_step_for_those_who_need_it_and_then_nothing():
    ordinary = make_engine(max_workers=3, expects_groups=False)
    ordinary.warm_up()
    assert ordinary._steps.decode_groups.num_compilations == 0
    ordinary.run(keyed([sharing(8)]), seed=0, temperature=1.0)
    assert ordinary._steps.decode_groups.num_compilations == ordinary.stats.compilations == 1
    shared, compiled = make_engine(max_workers=3), []
    shared.warm_up()

    def listener(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        shared.run(keyed(crowd(sharing(8))), seed=0, temperature=1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    assert shared.stats.compilations == 0


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        (lambda: sharing(1, headers=(1,) * 4, stops=((),) * 4, limits=(1,) * 4), ValueError, "made for 3"),
        (lambda: breaking(Truncate), ValueError, "opens its thread and decodes once"),
        (lambda: breaking(Append), ValueError, "opens its thread and decodes once"),
        (lambda: breaking(Decode), ValueError, "decodes once"),
        (lambda: sharing(1, length=0), ValueError, "without a prompt"),
    ],
)
def test_what_a_worker_may_not_do_is_refused_and_the_engine_goes_on(engine, program, error, message):
    with pytest.raises(error, match=message):
        engine.run(keyed([sharing(2), program()]), seed=0, temperature=1.0)
    engine._scheduler.check()
    assert engine._scheduler.num_running == 0
    assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)
    assert len(engine.run(keyed([sharing(1)]), seed=0, temperature=1.0)) == 1


def breaking(request):
    def rude():
        thread = yield Open([1])
        yield Decode(thread, (), max_tokens=2)
        yield {Truncate: Truncate(thread, 1), Append: Append(thread, [1]), Decode: Decode(thread, ())}[request]

    handle = yield Share([1, 2], [rude()])
    yield Join(handle)


def test_sizes_that_can_never_do_are_refused():
    with pytest.raises(ConfigError, match="need as many lanes"):
        make_engine(max_workers=9)
    with pytest.raises(ConfigError, match=r"may need 36 pages of engine\.page_size=8, and a data shard has 19"):
        make_engine(max_workers=3, pages=20)
    small = make_engine(max_workers=3, pages=20, expects_groups=False)
    with pytest.raises(ConfigError, match=r"pages of engine\.page_size=8"):
        small.run(keyed([sharing(1, limits=(None,) * 3, stops=((),) * 3, length=80)]), seed=0, temperature=1.0)
