"""The sampling policy, its draws, and its keys."""

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.engine.threads import RolloutKey, thread_key
from apr_jax.model.sampling import group_width, log_probs, probability_of_others, sample, uniforms


def test_log_probs_are_the_tempered_softmax_without_banned_tokens():
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    banned = np.array([0, 0, 1, 0, 0, 0, 1], bool)
    for temperature, scale in ((0.5, 0.5), (1.0, 1.0), (0.0, 1.0)):
        weights = np.where(banned, 0, np.exp(logits / scale))
        expected = weights / weights.sum(-1, keepdims=True)
        got = np.exp(np.asarray(log_probs(jnp.asarray(logits), temperature, jnp.asarray(banned))))
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert (got[:, banned] == 0).all()


def test_draws_follow_the_distribution_at_every_uniform():
    """The share of the unit interval that maps to a token is its probability."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=53) * 2, jnp.float32)
    banned = np.arange(53) % 5 == 0
    logprobs = log_probs(logits, 1.0, jnp.asarray(banned))
    grid = (jnp.arange(20_000) + 0.5) / 20_000
    drawn = np.asarray(jax.vmap(lambda u: sample(logprobs, u, 1.0))(grid))
    share = np.bincount(drawn, minlength=53) / 20_000
    np.testing.assert_allclose(share, np.exp(np.asarray(logprobs)), atol=2e-4)


def test_ends_of_the_cdf_never_give_a_banned_token():
    banned = np.ones(40, bool)
    banned[[3, 17, 21]] = False
    logprobs = log_probs(jnp.zeros(40), 1.0, jnp.asarray(banned))
    for uniform, token in ((0.0, 3), (1.0 - 2**-24, 21), (1.0, 21)):
        assert int(sample(logprobs, jnp.float32(uniform), 1.0)) == token


def test_temperature_zero_is_the_argmax():
    logprobs = jax.nn.log_softmax(jnp.asarray([0.0, 3.0, 1.0]))
    assert int(sample(logprobs, jnp.float32(0.999), 0.0)) == 1


def test_groups_are_of_the_square_root_and_in_large_vocabularies_of_a_tile():
    widths = {1: 1, 2: 2, 53: 8, 336: 19, 600: 25, 3_969: 63, 3_970: 128, 32_000: 128, 151_936: 128}
    assert {size: group_width(size) for size in widths} == widths


def test_draws_from_a_large_vocabulary_are_those_of_its_cdf():
    """The last group is not full; the likeliest tokens are two, and banned ones lie at both ends."""
    size = 5_000
    logits = np.random.default_rng(2).normal(size=size).astype(np.float32)
    logits[[1_234, 4_321]] = 7.0
    banned = np.arange(size) % 7 == 0
    banned[-3:] = True
    logprobs = log_probs(jnp.asarray(logits), 1.0, jnp.asarray(banned))
    grid = np.append((np.arange(2_000) + 0.5) / 2_000, [0.0, 1.0 - 2**-24]).astype(np.float32)
    drawn = np.asarray(jax.vmap(lambda u: sample(logprobs, u, 1.0))(jnp.asarray(grid)))
    cdf = np.cumsum(np.exp(np.asarray(logprobs, np.float64)))
    assert not banned[drawn].any()
    assert (cdf[drawn] > grid - 1e-5).all()
    assert (np.append(0.0, cdf)[drawn] <= grid + 1e-5).all()
    assert int(sample(logprobs, jnp.float32(0.5), 0.0)) == 1_234
    np.testing.assert_allclose(probability_of_others(logprobs, 4_321), 1 - np.exp(logprobs[4_321]), rtol=1e-5)


def test_keys_are_independent_and_counted():
    paths = [(), (0, 0), (0, 1), (1, 0), (0, 0, 0, 0)]
    keys = {
        thread_key(seed, RolloutKey(problem, number), path)
        for seed in range(3)
        for problem in range(3)
        for number in range(3)
        for path in paths
    }
    assert len(keys) == 3 * 3 * 3 * len(paths)
    draws = np.stack([np.asarray(uniforms(jnp.asarray(key, jnp.uint32), jnp.int32(0), 64)) for key in sorted(keys)])
    assert abs(draws.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.6
    key = jnp.asarray(sorted(keys)[0], jnp.uint32)
    np.testing.assert_array_equal(uniforms(key, jnp.int32(5), 3), draws[0][5:8])


def test_probability_of_others_is_exact_beside_a_token_that_has_nearly_all():
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32)
    logits[17] = 25.0
    others = np.exp(np.delete(logits, 17).astype(np.float64)).sum()
    expected = others / (others + np.exp(25.0))
    np.testing.assert_allclose(probability_of_others(jax.nn.log_softmax(jnp.asarray(logits)), 17), expected, rtol=1e-5)
    np.testing.assert_allclose(probability_of_others(jax.nn.log_softmax(jnp.asarray(logits)), 3), 1.0, rtol=1e-5)
