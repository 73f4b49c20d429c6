"""Lanes and pages that follow a device's memory: what fits, what stays with a run, and what is refused."""

import dataclasses

import pytest

from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.engine import sizes
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.sizes import Room
from apr_jax.train.hosted_engine import plan_engine
from apr_jax.train.memory import trainer_bytes
from configs.grpo import get_config
from tests.configs import LAPTOP, PAPER
from tests.engine.helpers import MODEL, SIZES, assert_same_bits, keyed, make_engine, make_mesh, plain

OPEN = dataclasses.replace(SIZES, lanes=-1, pages=-1)
GPU, V5E = 60 * 10**9, int(15.75 * 2**30)


@pytest.fixture
def memory(monkeypatch):
    """Devices of a CPU count as an accelerator's, with the memory that is set."""

    def has(limit):
        monkeypatch.setattr("apr_jax.engine.memory.memory_limit", lambda mesh: limit)

    monkeypatch.setattr(sizes, "ON_A_CPU", 1.0)
    monkeypatch.setattr(sizes, "_MOST_LANES", {})
    return has


def test_a_lane_for_every_quarter_of_a_context():
    room = Room(bytes=600, page=2, activations=lambda lanes: 5 * lanes, most_lanes=64)
    found = room.fill(OPEN, thread_pages=16, least_pages=16, least_lanes=1)
    assert (found.lanes, found.pages) == (40, (600 - 5 * 40) // 2), "48 lanes would need 192 pages and have 180"


def test_what_is_set_stays():
    room = Room(bytes=1_000, page=2, activations=lambda lanes: 0, most_lanes=64)
    lanes, pages = dataclasses.replace(OPEN, pages=-1, lanes=3), dataclasses.replace(OPEN, pages=33)
    assert room.fill(lanes, thread_pages=16, least_pages=16, least_lanes=1).pages == 3 * 16 + 1, (
        "more than full contexts is of no use"
    )
    assert room.fill(pages, thread_pages=16, least_pages=16, least_lanes=1).lanes == 8
    with pytest.raises(ConfigError, match=r"0\.00 GB of a device are left .* split the model over mesh\.tensor"):
        room.fill(OPEN, thread_pages=500, least_pages=500, least_lanes=1)


@pytest.mark.parametrize(("limit", "lanes"), [(GPU, range(128, 257)), (V5E, range(48, 129))])
def test_the_paper_has_tens_to_hundreds_of_lanes_beside_its_trainer(memory, limit, lanes):
    memory(limit)
    plan = plan_engine(PAPER, make_mesh())
    assert plan.sizes.lanes in lanes
    assert plan.memory.beside == trainer_bytes(PAPER, make_mesh()) > 5 * 4 * 220e6
    assert 0.4 * limit < plan.memory.total < 0.75 * limit, "half of what is left is the trainer's"
    assert plan.sizes.pages > plan.sizes.lanes * 16


@pytest.mark.slow
def test_seven_billion_weights_on_eight_devices(memory):
    memory(GPU)
    config = from_config_dict(get_config("7b"))
    from apr_jax.parallel.mesh import make_mesh as mesh_of

    plan = plan_engine(config, mesh_of(config.mesh))
    assert plan.limits.num_shards == 8
    assert plan.sizes.lanes >= 16
    assert plan.memory.total < GPU


def test_a_run_keeps_its_sizes_where_they_fit(memory):
    memory(10**9)
    config, mesh = with_engine(LAPTOP, lanes=-1, pages=-1), make_mesh()

    def sizes(config, chosen):
        found = plan_engine(config, mesh, chosen).sizes
        return found.lanes, found.pages

    assert sizes(config, {"lanes": 40, "pages": 700}) == (40, 700)
    anew = sizes(config, {})
    assert anew == sizes(config, {"lanes": 10**6, "pages": 10**8}) == sizes(config, {"lanes": "x", "pages": None})
    assert sizes(with_engine(LAPTOP, lanes=8, pages=300), {"lanes": 40, "pages": 700}) == (8, 300)


def with_engine(config: Config, **changes) -> Config:
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, **changes))


def test_a_trainer_counts_where_sizes_are_set(memory):
    memory(8 * 10**9)
    with pytest.raises(ConfigError, match=r"does not fit a device: .*beside 5\."):
        plan_engine(with_engine(PAPER, lanes=64, pages=1_024), make_mesh())


def test_a_device_that_tells_nothing_is_told_what_to_set(memory):
    memory(None)
    with pytest.raises(ConfigError, match="follow a device's memory, which this one does not tell; set both"):
        EnginePlan.of(MODEL, OPEN, make_mesh())


@pytest.mark.slow
def test_results_are_those_of_other_sizes(memory):
    programs = lambda: keyed([plain(seed) for seed in range(12)])  # noqa: E731
    memory(2 * 10**6)
    fitted = make_engine(lanes=-1, pages=-1)
    assert (fitted.limits.lanes, fitted.limits.pages) != (SIZES.lanes, SIZES.pages)
    memory(10**12)
    other = make_engine(lanes=fitted.limits.lanes)
    for a, b in zip(*(each.run(programs(), seed=3, temperature=1.0) for each in (fitted, other)), strict=True):
        assert_same_bits(a, b)
