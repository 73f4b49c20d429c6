"""engine.decode_attention: pages where they lie give what packed rows give, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.bench.agreement import agreement, decode_greedily, sharp_params
from apr_jax.config import ConfigError
from apr_jax.engine.prefill import PositionsInPlace
from apr_jax.model import native
from apr_jax.model.paged_attention import HeadTile
from tests.engine.helpers import (
    MODEL,
    ROLLOUT,
    SIZES,
    all_calls,
    assert_equals_naive,
    assert_same_bits,
    keyed,
    make_engine,
    make_mesh,
    make_params,
    plain,
    searching,
)
from tests.engine.hlo import aliases, collectives, collectives_over_data, copies_of, local_sizes, programs_of, text_of

pytestmark = pytest.mark.heavy

needs_kernels = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here")


HALF = dataclasses.replace(MODEL, compute_dtype="bfloat16")


def programs():
    return [searching(1, depth=2), plain(4), plain(5, length=1), plain(6, length=90)]


def assert_agree(ours, theirs):
    """Same tokens, log-probabilities to 1e-5."""
    for a, b in zip(all_calls(ours), all_calls(theirs), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def packed():
    """Greedy and sampled rollouts from packed rows."""
    engine = make_engine()
    return [engine.run(keyed(programs()), seed=4, temperature=temperature) for temperature in (0.0, 1.0)]


@pytest.fixture(scope="module")
def paged_engine():
    return make_engine(decode_attention="paged", pages=333)


def test_pages_in_place_equal_packed_rows_and_naive_decoding(packed, paged_engine):
    greedy = paged_engine.run(keyed(programs()), seed=4, temperature=0.0)
    for rollout, program in zip(greedy, programs(), strict=True):
        assert_equals_naive(rollout, program)
    assert_agree(greedy, packed[0])
    assert_agree(paged_engine.run(keyed(programs()), seed=4, temperature=1.0), packed[1])


def test_heads_side_by_side_change_nothing(packed, monkeypatch):
    """As a TPU lays them out: both key/value heads in one row of 128."""
    monkeypatch.setattr("apr_jax.engine.decode_cache.choose_impl", lambda *_: "xla")
    monkeypatch.setattr(HeadTile, "of", lambda *_: HeadTile(heads=2, padding=96))
    engine = make_engine(decode_attention="paged")
    assert engine._pages.keys[0].shape == (1, 97, 1, 8, 128)
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), packed[1])


def test_a_mesh_changes_nothing(packed):
    mesh = make_mesh(data=4, tensor=2)
    engine = make_engine(mesh, decode_attention="paged", lanes=4, pages=97, prefill_lanes=2)
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), packed[1])
    text = text_of(*programs_of(engine)["decode"])
    assert collectives(text)
    assert collectives_over_data(text, mesh) == []


def test_bits_do_not_depend_on_neighbours(paged_engine):
    alone = paged_engine.run(keyed([plain(1)]), seed=5, temperature=1.0)[0]
    crowd = paged_engine.run(
        keyed([plain(1), *(plain(s, length=3 + 5 * s) for s in range(9))]), seed=5, temperature=1.0
    )
    assert_same_bits(alone, crowd[0])


@needs_kernels
@pytest.mark.parametrize("model", [MODEL, HALF], ids=lambda model: model.compute_dtype)
def test_with_the_cpus_kernels_bits_do_not_depend_on_lanes_and_shards(model):
    wide_engine = make_engine(model=model, decode_attention="paged", pages=333)
    wide = wide_engine.run(keyed(programs()), seed=5, temperature=1.0)
    narrow = make_engine(model=model, decode_attention="paged", lanes=3, prefill_lanes=1)
    sharded = make_engine(make_mesh(data=8), model, decode_attention="paged", lanes=1, prefill_lanes=1)
    for engine in (narrow, sharded):
        for ours, theirs in zip(engine.run(keyed(programs()), seed=5, temperature=1.0), wide, strict=True):
            for a, b in zip(ours.calls, theirs.calls, strict=True):
                np.testing.assert_array_equal(a.tokens, b.tokens)
                assert a.logprobs.tobytes() == b.logprobs.tobytes()


@needs_kernels
def test_a_prefill_call_is_filled_from_one_thread_or_many(paged_engine):
    """One of 80 tokens takes three calls of 32, and eight of ten take as many: pages end no call."""
    assert paged_engine._steps.prefill.num_lanes == 32
    for lengths in ([81], [11] * 8):
        programs = [plain(seed, length=length) for seed, length in enumerate(lengths)]
        paged_engine.set_params(make_params())
        paged_engine.run(keyed(programs), seed=0, temperature=1.0)
        assert (paged_engine.stats.prefilled, paged_engine.stats.prefill_calls) == (80, 3)


def test_pages_of_one_position_are_prefilled_one_a_call(packed):
    """Packed rows are written after a call, so no call may take a thread's next position as well."""
    engine = make_engine(page_size=1, pages=8 * 96 + 1)
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), packed[1])


def test_nothing_is_reused_of_a_prefill_that_failed(paged_engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("no device")

    programs = [plain(1, length=40)]
    expected = make_engine(decode_attention="paged").run(keyed(programs), seed=5, temperature=1.0)[0]
    paged_engine.set_params(make_params())
    with monkeypatch.context() as patched:
        patched.setattr(type(paged_engine._steps.prefill), "__call__", fail)
        with pytest.raises(RuntimeError, match="no device"):
            paged_engine.run(keyed([plain(1, length=40)]), seed=5, temperature=1.0)
    stale = jax.tree.map(lambda x: x * 0 + 7.0, paged_engine._pages)
    paged_engine._pages = jax.device_put(stale, paged_engine._pages.keys[0].sharding)
    assert_same_bits(paged_engine.run(keyed([plain(1, length=40)]), seed=5, temperature=1.0)[0], expected)
    assert paged_engine.stats.reused == 0


def test_idle_lanes_write_to_the_trash_page_only(paged_engine):
    paged_engine.set_params(make_params())  # no page is shared with an earlier run
    marked = jax.tree.map(lambda x: x * 0 + 7.0, paged_engine._pages)
    paged_engine._pages = jax.device_put(marked, paged_engine._pages.keys[0].sharding)
    rollout = paged_engine.run(keyed([plain(1, length=10, stop_tokens=())]), seed=0, temperature=1.0)[0]
    computed = 10 + len(rollout.calls[0].tokens) - 1
    for array in (*paged_engine._pages.keys, *paged_engine._pages.values):
        changed = (np.asarray(array)[0, 1:] != 7.0).all(axis=(1, 3))
        assert changed.sum() == computed


@pytest.mark.parametrize("model", [MODEL, HALF], ids=lambda model: model.compute_dtype)
def test_pages_are_never_copied(model):
    paged_engine = make_engine(model=model, decode_attention="paged", pages=333)
    compiled, names = programs_of(paged_engine), ["decode"]
    if isinstance(paged_engine._steps.prefill, PositionsInPlace):
        names.append("prefill")
    arrays = len(jax.tree.leaves(paged_engine._pages))
    for name in names:
        text = text_of(*compiled[name])
        assert copies_of(text, local_sizes(paged_engine._pages)) == []
        assert {output: aliases(text).get(output) for output in range(arrays)} == {i: i for i in range(arrays)}


def test_a_page_that_a_kernel_cannot_take_is_refused(monkeypatch):
    monkeypatch.setattr("apr_jax.engine.decode_cache.choose_impl", lambda *_: "gpu")
    with pytest.raises(ConfigError, match=r"engine\.page_size=8 must be a power of two and at least 16"):
        make_engine(decode_attention="paged")


@needs_kernels
def test_in_bfloat16_the_cpus_kernels_are_as_near_to_float32_as_xla():
    """Greedy tokens are the float32 forward's but for ties, log-probabilities equal to bfloat16's rounding."""
    params, found = sharp_params(MODEL, 0), {}
    for impl in ("paged", "packed"):
        how = dataclasses.replace(SIZES, decode_attention=impl), dataclasses.replace(ROLLOUT, max_steps=24)
        found[impl] = agreement(decode_greedily(HALF, *how, make_mesh(), params, seed=0), MODEL, params)
    assert found["paged"].num_tokens > 100
    assert found["paged"].within(0.15)
    assert found["paged"].mean_difference < 1.3 * found["packed"].mean_difference
