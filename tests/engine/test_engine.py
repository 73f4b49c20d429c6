"""The engine's results: naive decoding's, whatever the schedule, the cache, the mesh and the neighbours."""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.engine.threads import Append, Decode, Join, Open, Prefill, RolloutKey, Spawn, StopReason, Truncate
from apr_jax.engine.work_counters import Work
from tests.engine.helpers import (
    BANNED,
    MODEL,
    all_calls,
    assert_close,
    assert_equals_naive,
    assert_same_bits,
    keyed,
    make_engine,
    make_mesh,
    make_params,
    plain,
    prompt,
    searching,
)

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def mixed_programs():
    return [searching(seed, depth=3) for seed in (1, 2)] + [plain(4), plain(5, length=1), plain(6, length=95)]


def test_greedy_equals_naive_decoding(engine):
    rollouts = engine.run(keyed(mixed_programs()), seed=0, temperature=0.0)
    assert max(len(call.path) for call in all_calls(rollouts)) == 6, "three levels of spawns"
    for rollout, program in zip(rollouts, mixed_programs(), strict=True):
        assert_equals_naive(rollout, program)


def test_four_levels_of_spawns_equal_naive_decoding(engine):
    rollout = engine.run(keyed([searching(2, depth=4)]), seed=0, temperature=0.0)[0]
    assert len({call.path for call in rollout.calls}) == 1 + 2 + 4 + 8 + 16
    assert max(len(call.path) for call in rollout.calls) == 2 * 4
    assert_equals_naive(rollout, searching(2, depth=4))


def test_greedy_equals_naive_decoding_in_a_tenth_of_the_cache():
    small = make_engine(pages=13)
    rollouts = small.run(keyed(mixed_programs()), seed=0, temperature=0.0)
    assert small.stats.preemptions > 0
    small._scheduler.check()
    assert all(allocator.num_held == 0 for allocator in small._scheduler.cache.allocators)
    for rollout, program in zip(rollouts, mixed_programs(), strict=True):
        assert_equals_naive(rollout, program)


def test_sampled_bits_do_not_depend_on_neighbours_or_order(engine):
    alone = engine.run([(RolloutKey(1, 0), searching(1, depth=2))], seed=5, temperature=1.0)[0]
    others = [(RolloutKey(10 + seed, 0), plain(seed, length=5 + 7 * seed)) for seed in range(12)]

    def target():
        return (RolloutKey(1, 0), searching(1, depth=2))

    last = engine.run([*others, target()], seed=5, temperature=1.0)[-1]
    others = [(RolloutKey(10 + seed, 0), plain(seed, length=3 + 5 * seed)) for seed in range(9)]
    first = engine.run([target(), *others], seed=5, temperature=1.0)[0]
    assert sum(len(call.tokens) for call in alone.calls) > 50
    assert_same_bits(alone, last)
    assert_same_bits(alone, first)


def test_sampled_bits_do_not_depend_on_prefix_reuse(engine):
    """Eight samples of one problem: with reuse one prefills the prompt, without it all do."""

    def group():
        return [(RolloutKey(3, sample), plain(3, length=40)) for sample in range(8)]

    without = make_engine(prefix_reuse=False)
    expected = without.run(group(), seed=1, temperature=1.0)
    assert without.stats.reused == 0
    engine.run([], seed=0, temperature=1.0)
    for _ in range(2):
        rollouts = engine.run(group(), seed=1, temperature=1.0)
        assert engine.stats.reused >= 7 * 32
        for one, other in zip(rollouts, expected, strict=True):
            assert_same_bits(one, other)


def test_forks_of_a_prefilled_thread_draw_the_same_bits_and_prefill_nothing(engine):
    """A prompt of two and a half pages, in forks and opened anew: computed once, its partial page included, or not."""

    def sample(tokens, thread):
        fork = yield Open(tokens, fork_of=thread)
        yield Decode(fork, (7,))
        return fork.logprob / fork.generated

    def samples(shared):
        thread = yield Open(prompt(808, 20))
        if shared:
            yield Prefill(thread)
        handle = yield Spawn([sample(() if shared else prompt(808, 20), thread if shared else None) for _ in range(3)])
        return (yield Join(handle))

    forked, opened = (engine.run(keyed([samples(shared)]), seed=1, temperature=1.0)[0] for shared in (True, False))
    assert_same_bits(forked, opened)
    assert len({call.tokens.tobytes() for call in forked.calls}) == 3, "each draws with its own key"
    assert forked.result == opened.result
    assert forked.result == pytest.approx([float(call.logprobs.astype(np.float64).mean()) for call in forked.calls])
    assert forked.work.prefilled == 19
    assert opened.work.prefilled == 3 * 3, "the two full pages were published by then, the partial one never is"


def test_the_work_of_rollouts_is_the_engines_own(engine):
    rollouts = engine.run(keyed(mixed_programs()), seed=0, temperature=1.0)
    work = sum((rollout.work for rollout in rollouts), Work())
    assert (work.prefilled, work.decoded) == (engine.stats.prefilled, engine.stats.generated)
    assert sum(rollout.generated_tokens for rollout in rollouts) == engine.stats.generated


def test_an_open_may_allow_fewer_tokens_than_the_model(engine):
    def narrow(max_length):
        thread = yield Open(prompt(6, 20), max_length=max_length)
        return (yield Decode(thread, ())), len(thread.tokens)

    for max_length, length in ((20, 20), (21, 21), (37, 37), (None, 52)):
        rollout = engine.run(keyed([narrow(max_length)]), seed=0, temperature=0.0)[0]
        (stop, held) = rollout.result
        assert held == length
        assert stop.reason is (StopReason.LENGTH if max_length else StopReason.MAX_STEPS)
        assert rollout.peak_context == (0 if max_length == 20 else length)


def test_draws_depend_on_seed_problem_sample_and_path(engine):
    def children(seed):
        thread = yield Open(prompt(seed, 5))
        handle = yield Spawn([plain(1), plain(1)])
        yield Join(handle)
        return (yield Decode(thread, ()))

    def wrote(seed, *keys, program=lambda: plain(1, stop_tokens=())):
        rollouts = engine.run([(RolloutKey(*key), program()) for key in keys], seed=seed, temperature=1.0)
        return [call.tokens.tolist() for call in all_calls(rollouts)]

    base, other_problem, other_sample = wrote(0, (1, 0), (2, 0), (1, 1))
    assert len({tuple(tokens) for tokens in (base, other_problem, other_sample)}) == 3
    assert wrote(0, (1, 0)) == [base]
    assert wrote(1, (1, 0)) != [base]
    _, first, second = wrote(0, (1, 0), program=lambda: children(1))
    assert first != second


def first_success(seed, children=5):
    """Children of many lengths; the first whose last token is even ends the others."""
    thread = yield Open(prompt(seed, 92))
    yield Decode(thread, ())
    handle = yield Spawn([plain_tokens(seed + child, length=60 + 7 * child) for child in range(children)])
    values = yield Join(handle, lambda tokens: tokens[-1] % 2 == 0)
    yield Truncate(thread, 80)
    yield Append(thread, [value[-1] for value in values if value is not None])
    yield Decode(thread, (7,))
    return values


def plain_tokens(seed, length):
    thread = yield Open(prompt(seed, length))
    yield Decode(thread, (1, 2, 3, 4))
    return list(thread.tokens)


def test_lane_widths_agree():
    """Also on which children are cancelled, and on what those wrote until then."""

    def programs():
        cancelling = [first_success(10 * seed) for seed in range(4)]
        return keyed([searching(1, depth=1), *cancelling, *(plain(seed, length=3 + seed) for seed in range(3))])

    wide = make_engine(lanes=16, pages=16 * 12 + 1).run(programs(), seed=2, temperature=1.0)
    assert {StopReason.CANCELLED, StopReason.TOKEN} <= {call.stop.reason for call in all_calls(wide)}
    for lanes in (1, 2):
        narrow = make_engine(lanes=lanes, prefill_lanes=1).run(programs(), seed=2, temperature=1.0)
        for one, other in zip(wide, narrow, strict=True):
            assert_close(one, other)
            assert one.result == other.result
            assert [call.stop for call in one.calls] == [call.stop for call in other.calls]


def test_a_first_success_frees_its_siblings_pages_in_the_same_visit(engine):
    """A child of 6 tokens succeeds in its first visit, in which its siblings of 32 have not ended."""

    def parent(success):
        thread = yield Open(prompt(0, 92))
        yield Decode(thread, ())
        handle = yield Spawn([plain(child, length=length, stop_tokens=()) for child, length in enumerate((90, 40, 50))])
        yield Join(handle, success)

    def held(success):
        pages = []

        def note(_):
            engine._scheduler.check()
            pages.append(engine._scheduler.cache.allocators[0].num_held)

        engine.run(keyed([parent(success)]), seed=0, temperature=1.0, on_progress=note)
        return pages

    of_parent = -(-95 // 8)
    patient = held(lambda stop: False)
    assert patient[:2] == [of_parent, of_parent + -(-47 // 8) + -(-57 // 8)]
    assert len(patient) == 1 + 32 // 8
    assert held(lambda stop: stop.reason is StopReason.LENGTH) == [of_parent, 0]


def test_eight_data_shards_equal_one_device():
    def programs():
        return keyed([searching(1, depth=2), searching(2, depth=1), *(plain(seed) for seed in range(20))])

    one = make_engine().run(programs(), seed=3, temperature=1.0)
    sharded = make_engine(make_mesh(data=8), lanes=8, pages=97, prefill_lanes=4)
    eight = sharded.run(programs(), seed=3, temperature=1.0)
    for a, b in zip(one, eight, strict=True):
        assert_same_bits(a, b)


def test_heads_over_tensor_equal_one_device():
    def programs():
        return keyed([searching(1, depth=1), plain(3, length=30), plain(4, stop_tokens=())])

    short = {"max_steps": 6, "steps_per_visit": 4}
    one = make_engine(**short).run(programs(), seed=3, temperature=1.0)
    split = make_engine(make_mesh(data=4, tensor=2), lanes=8, pages=97, prefill_lanes=2, **short)
    for a, b in zip(one, split.run(programs(), seed=3, temperature=1.0), strict=True):
        assert_close(a, b)


def test_banned_tokens_are_never_drawn(engine):
    rollouts = engine.run(keyed([plain(seed, stop_tokens=()) for seed in range(16)]), seed=0, temperature=5.0)
    drawn = np.concatenate([call.tokens for call in all_calls(rollouts)])
    assert len(drawn) == 16 * 32
    assert not set(drawn.tolist()) & set(BANNED)


def test_stops_and_limits(engine):
    def program():
        thread = yield Open(prompt(0, 90))
        stops = [(yield Decode(thread, ()))]
        stops.append((yield Decode(thread, ())))
        yield Truncate(thread, 10)
        stops.append((yield Decode(thread, ())))
        assert len(thread.tokens) == 10 + 32 - 6
        stops.append((yield Decode(thread, ())))
        yield Append(thread, prompt(1, 90))
        stops.append((yield Decode(thread, ())))
        return [stop.reason for stop in stops]

    rollout = engine.run(keyed([program()]), seed=0, temperature=1.0)[0]
    full, out = StopReason.LENGTH, StopReason.MAX_STEPS
    assert rollout.result == [full, full, out, out, full]
    assert [len(call.tokens) for call in rollout.calls] == [6, 26]
    assert [call.stop.reason for call in rollout.calls] == [full, out]


def test_a_rollout_writes_no_more_than_its_tokens(engine, monkeypatch):
    """Whoever else decodes: shares are fixed at spawns, so the same bits come out."""

    def target():
        return (RolloutKey(1, 0), searching(1, depth=2))

    free = engine.run([target()], seed=5, temperature=1.0)[0]
    monkeypatch.setattr(engine, "_max_total_tokens", 60)
    alone = engine.run([target()], seed=5, temperature=1.0)[0]
    assert sum(len(call.tokens) for call in alone.calls) <= 60 < sum(len(call.tokens) for call in free.calls)
    assert StopReason.BUDGET in {call.stop.reason for call in alone.calls}
    others = [(RolloutKey(10 + seed, 0), plain(seed, length=5 + 7 * seed)) for seed in range(9)]
    assert_same_bits(alone, engine.run([*others, target()], seed=5, temperature=1.0)[-1])


def test_clock_is_the_longest_chain(engine):
    def child(steps):
        thread = yield Open(prompt(steps, 70 + 26 - steps))
        yield Decode(thread, ())

    def parent():
        thread = yield Open(prompt(0, 92))
        yield Decode(thread, ())
        handle = yield Spawn([child(5), child(11), child(2)])
        yield Join(handle)
        yield Truncate(thread, 90)
        yield Decode(thread, ())

    rollout = engine.run(keyed([parent()]), seed=0, temperature=1.0)[0]
    assert rollout.sequential_tokens == 4 + 11 + 6
    starts = {(*call.path, len(call.tokens)): call.clock_start for call in rollout.calls}
    assert starts == {(4,): 0, (6,): 15, (0, 0, 5): 4, (0, 1, 11): 4, (0, 2, 2): 4}


def test_an_exception_in_a_program_propagates_and_the_engine_goes_on(engine):
    def broken():
        thread = yield Open([1, 2, 3])
        yield Decode(thread, ())
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        engine.run(keyed([plain(1), broken(), plain(2)]), seed=0, temperature=1.0)
    engine._scheduler.check()
    assert engine._scheduler.num_running == 0
    assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)
    assert len(engine.run(keyed([plain(1)]), seed=0, temperature=1.0)) == 1


def test_new_params_are_used_and_old_pages_never_read(engine):
    """Shared prompts under the old weights, then under new ones: bits and reuse are those of an engine just made."""

    def programs():
        return keyed([plain(1, length=40), plain(1, length=40), searching(1, depth=1), searching(1, depth=1)])

    def broken():
        thread = yield Open(prompt(1, 40))
        yield Decode(thread, ())
        raise KeyError("a bug")

    before = engine.run(programs(), seed=0, temperature=0.0)
    assert len(engine._scheduler.cache.allocators[0]._published) >= 4
    with pytest.raises(KeyError):  # threads that held published pages when the run ended
        engine.run(keyed([plain(1, length=40), broken()]), seed=0, temperature=0.0)
    engine.run(programs(), seed=0, temperature=0.0)
    assert len(engine._scheduler.cache.allocators[0]._published) >= 4
    engine.set_params(make_params(seed=1))
    assert not engine._scheduler.cache.allocators[0]._published
    after = engine.run(programs(), seed=0, temperature=0.0)
    fresh = make_engine()
    fresh.set_params(make_params(seed=1))
    for one, other in zip(after, fresh.run(programs(), seed=0, temperature=0.0), strict=True):
        assert_same_bits(one, other)
    assert engine.stats.reused == fresh.stats.reused > 0
    assert [call.logprobs.tobytes() for call in all_calls(after)] != [c.logprobs.tobytes() for c in all_calls(before)]
    engine.set_params(make_params())
    for one, other in zip(before, engine.run(programs(), seed=0, temperature=0.0), strict=True):
        assert_same_bits(one, other)


def test_nothing_compiles_after_warm_up():
    engine, compiled = make_engine(), []
    engine.warm_up()

    def listener(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        engine.run(keyed(mixed_programs()), seed=0, temperature=1.0)
        engine.set_params(make_params(seed=1))
        engine.run(keyed(mixed_programs()), seed=0, temperature=0.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    assert engine.stats.compilations == 0


def test_idle_lanes_write_to_the_trash_page_only():
    """With one thread in eight lanes, no page but its own (the first of a fresh engine) and the trash page changes."""
    engine = make_engine()
    marked = jax.tree.map(lambda x: x * 0 + 7.0, engine._pages)
    engine._pages = jax.device_put(marked, engine._pages.keys[0].sharding)
    engine.run(keyed([plain(1, length=10, stop_tokens=())]), seed=0, temperature=1.0)
    computed = 10 + 32 - 1
    for array in (*engine._pages.keys, *engine._pages.values):
        places = np.asarray(array)[0, 1:].swapaxes(1, 2).reshape(-1, MODEL.num_kv_heads * MODEL.head_dim)
        assert (places[:computed] != 7.0).all()
        assert (places[computed:] == 7.0).all()


def test_progress_and_stats(engine):
    seen = []
    engine.run(keyed([plain(s, stop_tokens=()) for s in range(20)]), seed=0, temperature=1.0, on_progress=seen.append)
    assert seen[-1].finished == seen[-1].total == 20
    assert seen[-1].generated_tokens == engine.stats.generated == 20 * 32
    assert 0 < engine.stats.lane_occupancy <= 1
    assert 0 <= engine.stats.host_share <= 1
    assert 0 <= engine.stats.cache_waste < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": 12}, "11 usable pages.*needs 12"),
        ({"banned": tuple(range(64))}, "all 64 tokens are banned"),
        ({"banned": (64,)}, "vocab_size=64"),
        ({"model": dataclasses.replace(MODEL, num_kv_heads=1)}, "num_kv_heads=1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(make_mesh(data=2, tensor=2), **changes)
