"""Lanes in two halves: one decodes while the host works for the other. The bits are those of all lanes together."""

import dataclasses

import jax
import pytest

from apr_jax.config_dict import from_config_dict
from apr_jax.engine import plan
from apr_jax.engine.plan import EnginePlan
from configs.grpo import get_config
from tests.engine.helpers import assert_close, assert_same_bits, keyed, make_engine, make_mesh, plain, searching
from tests.engine.test_interrupts import Interrupted
from tests.engine.test_programs import WIDE

pytestmark = pytest.mark.heavy


def programs():
    return keyed(
        [*(searching(seed, depth=2) for seed in range(4)), *(plain(seed, length=5 + seed) for seed in range(9))]
    )


@pytest.fixture(scope="module")
def expected():
    """Return what an engine writes whose lanes are as many as a half's."""
    return make_engine(lanes=4).run(programs(), seed=3, temperature=1.0)


def halved(monkeypatch, *arguments, **changes):
    with monkeypatch.context() as patch:
        patch.setattr(plan, "choose_halves", lambda *_: 2)
        return make_engine(*arguments, **changes)


@pytest.mark.parametrize("changes", [{}, {"lanes": 7, "prefix_reuse": False}])
def test_halves_draw_the_same_bits(monkeypatch, expected, changes):
    engine = halved(monkeypatch, **changes)
    engine.warm_up()
    for ours, theirs in zip(engine.run(programs(), seed=3, temperature=1.0), expected, strict=True):
        assert_same_bits(ours, theirs)
    assert engine.stats.compilations == engine.stats.preemptions == 0


def test_halves_of_two_shards_draw_the_same_in_a_small_cache(monkeypatch, expected):
    engine = halved(monkeypatch, make_mesh(data=2), lanes=5, pages=15)
    for ours, theirs in zip(engine.run(programs(), seed=3, temperature=1.0), expected, strict=True):
        assert_close(ours, theirs)
    engine._scheduler.check()
    assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)
    assert engine.stats.preemptions > 0


def test_a_half_is_launched_before_the_other_ones_tokens_are_read(monkeypatch):
    """Sixteen threads in eight lanes; then three, which decode together and leave the second half alone."""
    engine, order = halved(monkeypatch), []
    decode, device_get = engine._steps.decode, jax.device_get

    def launch(*arguments):
        order.append("launch")
        return decode(*arguments)

    def read(written):
        order.append("read")
        return device_get(written)

    monkeypatch.setattr(engine._steps, "decode", launch)
    monkeypatch.setattr(jax, "device_get", read)
    engine.run(keyed([plain(seed, stop_tokens=()) for seed in range(16)]), seed=0, temperature=1.0)
    assert order == ["launch", *["launch", "read"] * (2 * 2 * 32 // 8 - 1), "read"]
    order.clear()
    engine.run(keyed([plain(seed, stop_tokens=()) for seed in range(3)]), seed=0, temperature=1.0)
    assert order == ["launch", "read"] * (32 // 8)
    assert engine.stats.lane_occupancy == 3 / 4


@pytest.mark.parametrize(("step", "count"), [("decode", 2), ("decode", 5), ("prefill", 2)])
def test_an_interrupt_while_a_half_is_in_flight(monkeypatch, expected, step, count):
    engine = halved(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(engine._steps, step, Interrupted(getattr(engine._steps, step), count))
        with pytest.raises(KeyboardInterrupt):
            engine.run(programs(), seed=3, temperature=1.0)
    for ours, theirs in zip(engine.run(programs(), seed=3, temperature=1.0), expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("platform", "shards", "lanes", "workers", "halves"),
    [("gpu", 8, 256, 0, 2), ("gpu", 1, 256, 0, 1), ("gpu", 8, 256, 4, 1), ("cpu", 1, 64, 0, 1), ("tpu", 4, 80, 0, 1)],
)
def test_the_large_model_takes_halves_where_a_host_has_many_lanes(platform, shards, lanes, workers, halves):
    """228M weights in bfloat16, as `configs/grpo.py:paper` has them on eight GPUs, one, a CPU, and a host of v5es."""
    limits = dataclasses.replace(WIDE, num_shards=shards, lanes=lanes, steps_per_visit=64, max_workers=workers)
    assert plan.choose_halves(platform, 18, limits, 500_000_000) == halves


def test_the_laptop_takes_halves_from_64_lanes_on():
    config, mesh = from_config_dict(get_config("laptop")), make_mesh(data=2)
    for lanes, halves in ((16, 1), (32, 2)):
        sizes = dataclasses.replace(config.engine, lanes=lanes)
        assert EnginePlan.of(config.model, sizes, mesh).limits.halves == halves
