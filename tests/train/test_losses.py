"""GRPO against an independent implementation's numbers, and hand-worked cases."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.train import losses

ORACLE = pathlib.Path(__file__).parents[1] / "oracles" / "grpo_reference.json"


def _tokens(advantage, policy, kl, rollout=None):
    rollout = np.zeros_like(policy) if rollout is None else rollout
    return losses.GRPOTokens(*(jnp.asarray(x, jnp.float32) for x in (advantage, policy, kl, rollout)))


@pytest.mark.parametrize("case", json.loads(ORACLE.read_text()), ids=["apr", "serial"])
def test_grpo_equals_the_reference(case):
    mask = np.asarray(case["mask"], np.float32)
    expected = case["expected"]
    advantages = losses.group_advantages(case["rewards"], case["group_size"], eps=1e-10)
    of_call = advantages[case["rollout_of_call"]]
    np.testing.assert_allclose(of_call, expected["advantages"], atol=1e-7)
    weights = losses.call_weights(case["rollout_of_call"], mask.sum(1).astype(int).tolist(), case["kl_coef"])
    tokens = _tokens(
        of_call[:, None] * mask,
        np.asarray([[w.policy] for w in weights]) * mask,
        np.asarray([[w.kl] for w in weights]) * mask,
    )
    arrays = [jnp.asarray(case[k], jnp.float32) for k in ("logprobs", "old_logprobs", "ref_logprobs")]
    loss_fn = functools.partial(losses.grpo_loss, tokens=tokens, clip_ratio=case["clip_ratio"], importance_cap=0.0)
    (loss, terms), grad = jax.value_and_grad(loss_fn, has_aux=True)(*arrays)
    np.testing.assert_allclose(terms.policy_loss, expected["policy_loss"], atol=1e-5)
    np.testing.assert_allclose(terms.kl_loss / case["kl_coef"], expected["kl_loss"], atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    np.testing.assert_allclose(terms.clipped / terms.tokens, expected["clip_fraction"], atol=1e-5)
    np.testing.assert_allclose(grad, expected["grad_logprobs"], atol=1e-5)


def test_advantages_by_hand():
    advantages = losses.group_advantages([1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], 4, eps=1e-4)
    std = np.sqrt(3) / 4
    np.testing.assert_allclose(advantages[:4], [0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3)
    assert not advantages[4:].any()  # no signal: exactly zero, whatever eps
    assert not losses.group_advantages([0.1] * 3, 3, eps=0.0).any()
    with pytest.raises(ValueError, match="3 rewards do not divide into groups of 2"):
        losses.group_advantages([0, 1, 0], 2, 1e-4)


def test_weights_sum_to_what_the_nested_means_say():
    rollouts, tokens = [0, 0, 0, 1, 2, 2], [4, 1, 7, 3, 2, 0]
    weights = losses.call_weights(rollouts, tokens, kl_coef=0.01)
    assert weights[0] == losses.CallWeights(policy=1 / (6 * 3 * 4), kl=0.01 / (6 * 4))
    # A rollout's policy weights sum to 1/N however many calls it has; every call's KL weights to beta/N.
    for rollout in (0, 1):
        total = sum(w.policy * t for r, t, w in zip(rollouts, tokens, weights, strict=True) if r == rollout)
        np.testing.assert_allclose(total, 1 / 6)
    np.testing.assert_allclose(sum(w.kl * t for t, w in zip(tokens, weights, strict=True)), 0.01 * 5 / 6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [(1.0, 2.0, 2.0, 2.0), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0)],
)
def test_ppo_clip_by_hand(ratio, advantage, objective, slope):
    tokens = _tokens([[advantage]], np.ones((1, 1)), np.zeros((1, 1)))
    old = jnp.zeros((1, 1))

    def loss_fn(new):
        return losses.grpo_loss(new, old, new, tokens, clip_ratio=0.2, importance_cap=0.0)

    (loss, terms), grad = jax.value_and_grad(loss_fn, has_aux=True)(jnp.log(jnp.full((1, 1), ratio)))
    np.testing.assert_allclose(loss, -objective, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-slope]], rtol=1e-6)
    assert int(terms.clipped) == int(slope == 0)


def test_importance_weight_is_truncated():
    tokens = _tokens([[1.0, 1.0]], np.ones((1, 2)), np.zeros((1, 2)), rollout=np.log([[0.5, 0.01]]))
    old = jnp.log(jnp.asarray([[0.25, 0.5]]))
    loss, _ = losses.grpo_loss(old, old, old, tokens, clip_ratio=0.2, importance_cap=2.0)
    np.testing.assert_allclose(loss, -(0.5 + 2.0), rtol=1e-6)


def test_tokens_without_loss_cannot_poison_it():
    tokens = _tokens([[1.0, 0.0]], [[1.0, 0.0]], [[0.1, 0.0]])
    new, old = jnp.asarray([[-1.0, -jnp.inf]]), jnp.asarray([[-1.0, 0.0]])
    (loss, _), grad = jax.value_and_grad(
        lambda x: losses.grpo_loss(x, old, old, tokens, clip_ratio=0.2, importance_cap=2.0), has_aux=True
    )(new)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()


def test_chunked_scores_equal_whole_ones():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (3, 12, 8)), jax.random.normal(keys[1], (8, 32))
    targets = jax.random.randint(keys[2], (3, 12), 0, 32)

    def loss(head, max_logits):
        scores = losses.token_scores(hidden, targets, lambda h: h @ head, jax.nn.log_softmax, 32, max_logits)
        return losses.weighted_nll(scores.logprob_BT, jnp.full((3, 12), 1 / 36)), scores

    assert losses.num_chunks(3, 12, 32, 3 * 3 * 32) == 4
    (whole, scores), grad = jax.value_and_grad(loss, has_aux=True)(head, 1 << 24)
    (chunked, chunked_scores), chunked_grad = jax.value_and_grad(loss, has_aux=True)(head, 3 * 3 * 32)
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    np.testing.assert_allclose(chunked_grad, grad, atol=1e-6)
    np.testing.assert_allclose(chunked_scores.logprob_BT, scores.logprob_BT, atol=1e-6)
    np.testing.assert_array_equal(chunked_scores.top_BT, scores.top_BT)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], -1).mean()
    np.testing.assert_allclose(whole, expected, rtol=1e-6)


def test_normalise():
    weights = losses.normalise(np.asarray([[1, 0, 3]], np.float32))
    np.testing.assert_allclose(weights, [[0.25, 0, 0.75]])
    with pytest.raises(ValueError, match="no token to learn from"):
        losses.normalise(np.zeros((2, 3), np.float32))


def test_chunked_scores_never_hold_all_logits():
    """Neither forward nor backward has an array of B * T * V elements, and without chunks both have."""
    batch, time, dim, vocab = 2, 64, 8, 96

    def program(max_logits):
        def loss(hidden, head):
            targets = jnp.zeros((batch, time), jnp.int32)
            scores = losses.token_scores(hidden, targets, lambda h: h @ head, jax.nn.log_softmax, vocab, max_logits)
            return losses.weighted_nll(scores.logprob_BT, jnp.ones((batch, time)))

        shapes = jnp.zeros((batch, time, dim)), jnp.zeros((dim, vocab))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile().as_text()

    def largest(text):
        return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([0-9,]+)\]", text))

    assert largest(program(1 << 24)) >= batch * time * vocab
    assert largest(program(batch * 8 * vocab)) <= max(batch * 8 * vocab, batch * time * dim)
