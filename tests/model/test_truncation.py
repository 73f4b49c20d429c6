"""Top-k, top-p and min-p against their definitions, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.sampling import MASKED_LOGIT, log_probs, sample
from apr_jax.model.truncation import Truncation, count_kept, keep_most, truncated

RULES = [
    Truncation(top_k=1),
    Truncation(top_k=5),
    Truncation(top_k=10_000),
    Truncation(top_p=0.01),
    Truncation(top_p=0.5),
    Truncation(top_p=0.9999),
    Truncation(min_p=0.02),
    Truncation(min_p=1.0),
    Truncation(top_k=20, top_p=0.8),
    Truncation(top_k=20, top_p=0.8, min_p=0.1),
]


def kept(probs: np.ndarray, rule: Truncation) -> np.ndarray:
    """The tokens that the rules keep, in order, by their papers' words."""
    order = np.argsort(-probs, kind="stable")
    order = order[: rule.top_k or None]
    shares, total, chosen = probs[order] / probs[order].sum(), 0.0, []
    for token, share in zip(order, shares, strict=True):
        if rule.top_p < 1 and total >= rule.top_p:
            break
        total += share
        chosen.append(token)
    return np.asarray([token for token in chosen if probs[token] >= rule.min_p * probs.max()])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_kept_and_its_probabilities_are_the_definitions(rule: Truncation, temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(40, 71)) * 3, jnp.float32)
    banned = jnp.asarray(rng.random(71) < 0.2)
    before = log_probs(logits, temperature, banned)
    after = np.exp(np.asarray(truncated(before, rule), np.float64))
    for probs, cut in zip(np.exp(np.asarray(before, np.float64)), after, strict=True):
        expected = np.zeros(71)
        chosen = kept(np.where(np.asarray(banned), 0.0, probs), rule)
        chosen = chosen[probs[chosen] > 0]
        expected[chosen] = probs[chosen] / probs[chosen].sum()
        np.testing.assert_allclose(cut, expected, atol=2e-6)


def test_without_a_rule_nothing_is_touched() -> None:
    logprobs = jax.nn.log_softmax(jnp.asarray([0.0, 1.0, 2.0]))
    assert not Truncation().cuts
    assert truncated(logprobs, Truncation()) is logprobs


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_that_is_cut_off_is_never_drawn_and_the_best_always_stays(rule: Truncation) -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(size=37) * 2, jnp.float32)
    before = log_probs(logits, 1.0, jnp.zeros(37, bool))
    logprobs = truncated(before, rule)
    grid = jnp.concatenate([(jnp.arange(999) + 0.5) / 999, jnp.asarray([0.0, 1.0 - 2**-24, 1.0])])
    drawn = {*np.asarray(jax.vmap(lambda u: sample(logprobs, u, 1.0))(grid)).tolist()}
    assert drawn <= {*kept(np.exp(np.asarray(before, np.float64)), rule).tolist()}
    assert int(jnp.argmax(logits)) in drawn
    assert int(sample(logprobs, jnp.float32(0.9), 0.0)) == int(jnp.argmax(logits))


def test_equal_tokens_share_their_fate() -> None:
    logprobs = jax.nn.log_softmax(jnp.asarray([2.0, 1.0, 1.0, 0.0]))
    for rule in (Truncation(top_k=2), Truncation(top_p=0.7), Truncation(min_p=0.3)):
        assert (np.asarray(truncated(logprobs, rule)) > MASKED_LOGIT / 2).tolist() == [True, True, True, False]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.top_k < 100], ids=str)
def test_a_drawn_token_stays_and_its_gradient_is_finite(rule: Truncation) -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 23)) * 3, jnp.float32)
    drawn = jnp.argmin(logits, axis=-1).at[0, 0].set(jnp.argmax(logits[0, 0]))
    logprobs = log_probs(logits, 1.0, jnp.zeros(23, bool))
    count = count_kept(truncated(logprobs, rule))

    def total(logits: jax.Array) -> jax.Array:
        logprobs = keep_most(log_probs(logits, 1.0, jnp.zeros(23, bool)), count, drawn)
        return jnp.sum(jnp.take_along_axis(logprobs, drawn[..., None], axis=-1))

    value, gradient = jax.value_and_grad(total)(logits)
    assert -1e4 < value < 0 or rule.top_k == 1
    assert np.isfinite(np.asarray(gradient)).all()
    free = jnp.argmax(logits, axis=-1)
    np.testing.assert_array_equal(keep_most(logprobs, count, free), truncated(logprobs, rule))
    np.testing.assert_array_equal(keep_most(logprobs, jnp.zeros_like(count), free), jax.nn.log_softmax(logprobs))


@pytest.mark.parametrize(
    "rule", [Truncation(top_p=0.8), Truncation(min_p=0.05), Truncation(top_k=30, top_p=0.9)], ids=str
)
def test_as_many_tokens_stay_where_rounding_moves_the_cut(rule: Truncation) -> None:
    """Ten thousand draws, scored by logits that differ in their last bits, as a trainer's do."""
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(10_000, 61)) * 2, jnp.float32)
    rounded = logits * jnp.asarray(1 + rng.uniform(-1, 1, logits.shape) * 1e-5, jnp.float32)
    there, here = (log_probs(each, 1.0, jnp.arange(61) < 3) for each in (logits, rounded))
    drawn_from = truncated(there, rule)
    drawn = jnp.argmax(drawn_from, axis=-1)

    def worst(scored: jax.Array) -> float:
        gap = jnp.take_along_axis(scored - drawn_from, drawn[:, None], axis=-1)
        return float(jnp.abs(gap).max())

    assert worst(keep_most(here, count_kept(drawn_from), drawn)) < 2e-4
    assert worst(truncated(here, rule)) > 1e-3, "applied again, the rule itself would cut elsewhere"
