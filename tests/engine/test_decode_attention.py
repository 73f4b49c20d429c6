"""engine.decode_attention: a platform's kernel gives what XLA gives, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from apr_jax.bench.agreement import agreement, decode_greedily, sharp_params
from apr_jax.engine.prefill import InPlace
from apr_jax.kernels import DecodeKernels, InPlacePrefill, cpu_kernels
from apr_jax.kernels.tpu import paged_attention as tpu
from apr_jax.kernels.tpu.write_then_attend import UNIT
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.ops import XLA
from apr_jax.model.paged_attention import PagedAttention
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

needs_kernels = pytest.mark.skipif(cpu_kernels("cpu") is None, reason="no C++ compiler here")


HALF = dataclasses.replace(MODEL, compute_dtype="bfloat16")


def programs():
    return [searching(1, depth=2), plain(4), plain(5, length=1), plain(6, length=90)]


def assert_agree(ours, theirs):
    """Same tokens, log-probabilities to 1e-5."""
    for a, b in zip(all_calls(ours), all_calls(theirs), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def plainly():
    """Greedy and sampled rollouts by XLA."""
    engine = make_engine()
    return [engine.run(keyed(programs()), seed=4, temperature=temperature) for temperature in (0.0, 1.0)]


@pytest.fixture(scope="module")
def kernel_engine():
    return make_engine(decode_attention="auto", pages=333)


def test_kernels_equal_xla_and_naive_decoding(plainly, kernel_engine):
    greedy = kernel_engine.run(keyed(programs()), seed=4, temperature=0.0)
    for rollout, program in zip(greedy, programs(), strict=True):
        assert_equals_naive(rollout, program)
    assert_agree(greedy, plainly[0])
    assert_agree(kernel_engine.run(keyed(programs()), seed=4, temperature=1.0), plainly[1])


def test_heads_side_by_side_change_nothing(plainly, monkeypatch):
    """As a TPU lays them out: both key/value heads in one row of 128."""
    tiled = DecodeKernels(XLA, PagedAttention(HeadTile(heads=2, padding=96)), prefill=None, own_head=False)
    monkeypatch.setattr("apr_jax.engine.plan.for_decoding", lambda *_: tiled)
    engine = make_engine()
    assert engine._pages.keys[0].shape == (1, 97, 1, 8, 128)
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), plainly[1])


@pytest.mark.slow
def test_the_tpus_kernels_equal_xla(monkeypatch):
    """In interpret mode: prompts of several units and pages, one of which two threads share, then some steps."""
    sizes = {"page_size": 32, "lanes": 2, "pages": 9, "steps_per_visit": 3, "max_steps": 5}

    def run():
        threads = [plain(4, length=70, stop_tokens=()), plain(4, length=70, stop_tokens=()), plain(5, length=1)]
        return make_engine(**sizes).run(keyed(threads), seed=4, temperature=1.0)

    expected, tile = run(), HeadTile(heads=2, padding=96)
    prefill = InPlacePrefill(tpu.TpuUnitAttention(tile), unit=UNIT, block=2 * UNIT)
    chosen = DecodeKernels(XLA, tpu.TpuPagedAttention(tile), prefill, own_head=False)
    monkeypatch.setattr("apr_jax.engine.plan.for_decoding", lambda *_: chosen)
    with pltpu.force_tpu_interpret_mode():
        assert_agree(run(), expected)


def test_positions_in_place_change_nothing(plainly, monkeypatch):
    """As a GPU prefills: one position a lane, in blocks that do not divide a call's 32."""
    prefill = InPlacePrefill(PagedAttention(), unit=1, block=20)
    chosen = DecodeKernels(XLA, PagedAttention(), prefill, own_head=False)
    monkeypatch.setattr("apr_jax.engine.plan.for_decoding", lambda *_: chosen)
    engine = make_engine()
    assert engine._steps.prefill.num_lanes == 40
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), plainly[1])


def test_a_mesh_changes_nothing(plainly):
    mesh = make_mesh(data=4, tensor=2)
    engine = make_engine(mesh, decode_attention="auto", lanes=4, pages=97, prefill_lanes=2)
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), plainly[1])
    text = text_of(*programs_of(engine)["decode"])
    assert collectives(text)
    assert collectives_over_data(text, mesh) == []


def test_bits_do_not_depend_on_neighbours(kernel_engine):
    alone = kernel_engine.run(keyed([plain(1)]), seed=5, temperature=1.0)[0]
    crowd = kernel_engine.run(
        keyed([plain(1), *(plain(s, length=3 + 5 * s) for s in range(9))]), seed=5, temperature=1.0
    )
    assert_same_bits(alone, crowd[0])


@needs_kernels
@pytest.mark.parametrize("model", [MODEL, HALF], ids=lambda model: model.compute_dtype)
def test_with_the_cpus_kernels_bits_do_not_depend_on_lanes_and_shards(model):
    wide_engine = make_engine(model=model, decode_attention="auto", pages=333)
    wide = wide_engine.run(keyed(programs()), seed=5, temperature=1.0)
    narrow = make_engine(model=model, decode_attention="auto", lanes=3, prefill_lanes=1)
    sharded = make_engine(make_mesh(data=8), model, decode_attention="auto", lanes=1, prefill_lanes=1)
    for engine in (narrow, sharded):
        for ours, theirs in zip(engine.run(keyed(programs()), seed=5, temperature=1.0), wide, strict=True):
            for a, b in zip(ours.calls, theirs.calls, strict=True):
                np.testing.assert_array_equal(a.tokens, b.tokens)
                assert a.logprobs.tobytes() == b.logprobs.tobytes()


@needs_kernels
def test_a_prefill_call_is_filled_from_one_thread_or_many(monkeypatch):
    """One of 80 tokens takes three calls of 32, and eight of ten take as many: pages end no call."""
    monkeypatch.setattr("apr_jax.engine.plan.choose_halves", lambda *_: 1)  # a call is of one half's threads
    engine = make_engine(decode_attention="auto", pages=333)
    assert engine._steps.prefill.num_lanes == 32
    for lengths in ([81], [11] * 8):
        programs = [plain(seed, length=length) for seed, length in enumerate(lengths)]
        engine.set_params(make_params())
        engine.run(keyed(programs), seed=0, temperature=1.0)
        assert (engine.stats.prefilled, engine.stats.prefill_calls) == (80, 3)


def test_pages_of_one_position_are_prefilled_one_a_call(plainly):
    """A page is written after its call, so no call may take a thread's next position as well."""
    engine = make_engine(page_size=1, pages=8 * 96 + 1)
    assert_agree(engine.run(keyed(programs()), seed=4, temperature=1.0), plainly[1])


def test_nothing_is_reused_of_a_prefill_that_failed(kernel_engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("no device")

    programs = [plain(1, length=40)]
    expected = make_engine(decode_attention="auto").run(keyed(programs), seed=5, temperature=1.0)[0]
    kernel_engine.set_params(make_params())
    with monkeypatch.context() as patched:
        patched.setattr(type(kernel_engine._steps.prefill), "__call__", fail)
        with pytest.raises(RuntimeError, match="no device"):
            kernel_engine.run(keyed([plain(1, length=40)]), seed=5, temperature=1.0)
    stale = jax.tree.map(lambda x: x * 0 + 7.0, kernel_engine._pages)
    kernel_engine._pages = jax.device_put(stale, kernel_engine._pages.keys[0].sharding)
    assert_same_bits(kernel_engine.run(keyed([plain(1, length=40)]), seed=5, temperature=1.0)[0], expected)
    assert kernel_engine.stats.reused == 0


def test_idle_lanes_write_to_the_trash_page_only(kernel_engine):
    kernel_engine.set_params(make_params())  # no page is shared with an earlier run
    marked = jax.tree.map(lambda x: x * 0 + 7.0, kernel_engine._pages)
    kernel_engine._pages = jax.device_put(marked, kernel_engine._pages.keys[0].sharding)
    rollout = kernel_engine.run(keyed([plain(1, length=10, stop_tokens=())]), seed=0, temperature=1.0)[0]
    computed = 10 + len(rollout.calls[0].tokens) - 1
    for array in (*kernel_engine._pages.keys, *kernel_engine._pages.values):
        changed = (np.asarray(array)[0, 1:] != 7.0).all(axis=(1, 3))
        assert changed.sum() == computed


@pytest.mark.parametrize("model", [MODEL, HALF], ids=lambda model: model.compute_dtype)
def test_pages_are_never_copied(model):
    kernel_engine = make_engine(model=model, decode_attention="auto", pages=333)
    compiled, names = programs_of(kernel_engine), ["decode"]
    if isinstance(kernel_engine._steps.prefill, InPlace):
        names.append("prefill")
    arrays = len(jax.tree.leaves(kernel_engine._pages))
    for name in names:
        text = text_of(*compiled[name])
        assert copies_of(text, local_sizes(kernel_engine._pages)) == []
        assert {output: aliases(text).get(output) for output in range(arrays)} == {i: i for i in range(arrays)}


@needs_kernels
def test_in_bfloat16_the_cpus_kernels_are_as_near_to_float32_as_xla():
    """Greedy tokens are the float32 forward's but for ties, log-probabilities equal to bfloat16's rounding."""
    params, found = sharp_params(MODEL, 0), {}
    for impl in ("auto", "xla"):
        how = dataclasses.replace(SIZES, decode_attention=impl), dataclasses.replace(ROLLOUT, max_steps=24)
        found[impl] = agreement(decode_greedily(HALF, *how, make_mesh(), params, seed=0), MODEL, params)
    assert found["auto"].num_tokens > 100
    assert found["auto"].within(0.15)
    assert found["auto"].mean_difference < 1.3 * found["xla"].mean_difference
