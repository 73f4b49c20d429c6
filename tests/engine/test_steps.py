"""What the compiled steps must not contain: communication between data shards, and copies of the cache."""

import re

import pytest

from tests.engine.helpers import make_engine, make_mesh

COLLECTIVES = re.compile(r"= .*\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def compiled(engine):
    """The optimised HLO of both large steps."""
    steps, policy = engine._steps, engine._policy(1.0)
    decode = steps.decode.lower(engine._pages, engine._params, engine._decode_lanes()[0], policy)
    prefill = steps._compute.lower(engine._pages, engine._params, engine._prefill_lanes([]))
    return [step.compile().as_text() for step in (decode, prefill)]


@pytest.fixture(scope="module")
def one_device():
    return make_engine(num_pages=333)


def test_no_collective_over_data():
    for text in compiled(make_engine(make_mesh(data=8), num_lanes=8, num_pages=8 * 13, prefill_lanes=8)):
        assert not [line for line in text.splitlines() if COLLECTIVES.search(line)]


def test_collectives_of_split_heads_stay_within_a_data_shard():
    for text in compiled(make_engine(make_mesh(data=2, tensor=2), num_lanes=8, num_pages=2 * 13, prefill_lanes=8)):
        lines = [line for line in text.splitlines() if COLLECTIVES.search(line)]
        assert lines
        assert all("replica_groups=[2,2]<=[4]," in line for line in lines)


def test_pages_are_never_copied(one_device):
    """Every instruction that makes an array of all pages is an update in place, not a copy."""
    for text in compiled(one_device):
        sized = re.compile(r"= f32\[(1,)?333,2,8,16\]\S* copy\(")
        assert "f32[1,333,2,8,16]" in text
        assert not [line for line in text.splitlines() if sized.search(line)]


def test_weights_meet_all_lanes_in_one_matmul(one_device):
    """Lifted over lanes, the MLP's products are [L, D] x [D, F]."""
    decode = compiled(one_device)[0]
    assert re.search(r"f32\[8,48\]\S* (dot|fusion)\(", decode)
    assert not re.search(r"f32\[8,1,48\]\S* dot\(", decode)
