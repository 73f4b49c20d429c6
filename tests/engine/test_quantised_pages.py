"""engine.page_dtype="int8": rollouts are as deterministic as ever, and log-probabilities near those of whole pages."""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.bench.agreement import agreement, decode_greedily, sharp_params
from apr_jax.engine.threads import RolloutKey
from tests.engine.helpers import (
    MODEL,
    ROLLOUT,
    SIZES,
    assert_same_bits,
    keyed,
    make_engine,
    make_mesh,
    make_params,
    plain,
    searching,
)

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def engine():
    return make_engine(page_dtype="int8")


def test_pages_take_a_byte_an_element_and_four_a_head(engine):
    head = MODEL.head_dim + 4
    assert {(page.dtype, page.shape[-1]) for page in jax.tree.leaves(engine._pages)} == {(np.dtype("int8"), head)}


def test_sampled_bits_do_not_depend_on_neighbours_nor_on_shared_pages(engine):
    """Spawns, joins and copies of pages among other threads, and alone."""

    def target():
        return RolloutKey(1, 0), searching(1, depth=2)

    alone = engine.run([target()], seed=5, temperature=1.0)[0]
    others = [(RolloutKey(10 + seed, 0), plain(seed, length=5 + 7 * seed)) for seed in range(9)]
    assert_same_bits(alone, engine.run([*others, target()], seed=5, temperature=1.0)[-1])
    group = [(RolloutKey(3, sample), plain(3, length=40)) for sample in range(4)]
    shared = engine.run(group, seed=1, temperature=1.0)
    assert engine.stats.reused > 0
    for sample in range(4):
        engine.set_params(make_params(MODEL))
        apart = engine.run([(RolloutKey(3, sample), plain(3, length=40))], seed=1, temperature=1.0)[0]
        assert_same_bits(shared[sample], apart)


def test_log_probabilities_are_near_a_float32_forwards():
    """Over sharp weights, whose next token hangs on what is attended to."""
    sizes = dataclasses.replace(SIZES, page_dtype="int8")
    params = sharp_params(MODEL, 0)
    calls = decode_greedily(MODEL, sizes, dataclasses.replace(ROLLOUT, max_steps=8), make_mesh(), params, seed=0)
    found = agreement(calls, MODEL, params)
    assert found.num_tokens > 30
    assert found.max_difference < 0.1
    assert found.mean_difference < 0.02
    assert found.max_difference > 1e-4


@pytest.mark.slow
def test_heads_are_split_over_tensor():
    expected = make_engine(page_dtype="int8").run(keyed([plain(4)]), seed=4, temperature=1.0)[0]
    split = make_engine(make_mesh(data=1, tensor=2), page_dtype="int8").run(keyed([plain(4)]), seed=4, temperature=1.0)
    np.testing.assert_array_equal(split[0].calls[0].tokens, expected.calls[0].tokens)
