"""Scores of targets in chunks."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.train.scorer import num_chunks, token_scores
from apr_jax.train.sft import weighted_nll


def test_chunked_scores_equal_whole_ones():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (3, 12, 8)), jax.random.normal(keys[1], (8, 32))
    targets = jax.random.randint(keys[2], (3, 12), 0, 32)

    def loss(head, max_logits):
        scores = token_scores(hidden, targets, lambda h: h @ head, jax.nn.log_softmax, 32, max_logits)
        return weighted_nll(scores.logprob_BT, jnp.full((3, 12), 1 / 36)), scores

    assert num_chunks(3, 12, 32, 3 * 3 * 32) == 4
    (whole, scores), grad = jax.value_and_grad(loss, has_aux=True)(head, 1 << 24)
    (chunked, chunked_scores), chunked_grad = jax.value_and_grad(loss, has_aux=True)(head, 3 * 3 * 32)
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    np.testing.assert_allclose(chunked_grad, grad, atol=1e-6)
    np.testing.assert_allclose(chunked_scores.logprob_BT, scores.logprob_BT, atol=1e-6)
    np.testing.assert_array_equal(chunked_scores.top_BT, scores.top_BT)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], -1).mean()
    np.testing.assert_allclose(whole, expected, rtol=1e-6)


def test_chunked_scores_never_hold_all_logits():
    """Neither forward nor backward has an array of B * T * V elements, and without chunks both have."""
    batch, time, dim, vocab = 2, 64, 8, 96

    def program(max_logits):
        def loss(hidden, head):
            targets = jnp.zeros((batch, time), jnp.int32)
            scores = token_scores(hidden, targets, lambda h: h @ head, jax.nn.log_softmax, vocab, max_logits)
            return weighted_nll(scores.logprob_BT, jnp.ones((batch, time)))

        shapes = jnp.zeros((batch, time, dim)), jnp.zeros((dim, vocab))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile().as_text()

    def largest(text):
        return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([0-9,]+)\]", text))

    assert largest(program(1 << 24)) >= batch * time * vocab
    assert largest(program(batch * 8 * vocab)) <= max(batch * 8 * vocab, batch * time * dim)
