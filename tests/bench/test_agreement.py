"""The measure of a device's decoding: right tokens pass, ties pass, wrong tokens and wrong log-probabilities do not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.bench.agreement import agreement, compare, decode_greedily, regret, sharp_params
from apr_jax.model.params import graphdef
from apr_jax.model.views.training import training_rows
from tests.engine.helpers import MODEL, ROLLOUT, SIZES, make_mesh

REFERENCE_TV = np.log(np.asarray([[0.5, 0.3, 0.2], [0.4, 0.39999, 0.20001], [0.1, 0.1, 0.8]]))


def compared(*tokens, shift=0.0):
    written = np.asarray(tokens)
    return compare(written, REFERENCE_TV[np.arange(3), written] + shift, REFERENCE_TV)


def test_the_best_tokens_agree():
    found = compared(0, 0, 2)
    assert (found.num_tokens, found.num_other, found.max_regret, found.max_difference) == (3, 0, 0.0, 0.0)
    assert found.within(0.0)


def test_a_tie_agrees_within_its_tolerance_only():
    found = compared(0, 1, 2)
    assert found.num_other == 1
    assert found.within(1e-4)
    assert not found.within(1e-6)


def test_another_token_does_not_agree():
    assert compared(1, 0, 2).max_regret == pytest.approx(np.log(0.5 / 0.3))
    assert not compared(1, 0, 2).within(0.1)


def test_another_log_probability_does_not_agree():
    found = compared(0, 0, 2, shift=-0.2)
    assert found.mean_difference == pytest.approx(0.2)
    assert not found.within(0.1)
    assert found.within(0.9)


def test_nothing_written_is_no_agreement():
    assert not compare(np.zeros((0,), int), np.zeros((0,)), np.zeros((0, 3))).within(1.0)


@pytest.fixture(scope="module")
def calls():
    """What the CPU's engine writes from pages in place."""
    sizes, rollout = dataclasses.replace(SIZES, decode_attention="auto"), dataclasses.replace(ROLLOUT, max_steps=8)
    return decode_greedily(MODEL, sizes, rollout, make_mesh(), sharp_params(MODEL, 0), seed=0)


def test_this_engine_agrees(calls):
    found = agreement(calls, MODEL, sharp_params(MODEL, 0))
    assert found.num_tokens == sum(len(call.tokens) for call in calls) > 30
    assert found.within(1e-4)


def test_wrong_positions_do_not_agree(calls):
    other = dataclasses.replace(MODEL, rope_theta=10.0)
    assert not agreement(calls, other, sharp_params(MODEL, 0)).within(0.8)


@pytest.mark.heavy
def test_regret_is_what_the_best_tokens_have_on_those_written(calls):
    """Nothing for the argmax of plain forwards, whatever was fed before; all of it for the least likely token."""
    params = sharp_params(MODEL, 0)
    call = calls[-1]
    assert regret(call.context, call.tokens, MODEL, params) == pytest.approx(0, abs=1e-4)
    llama = nnx.merge(graphdef(MODEL), params)
    context_T = jnp.asarray(call.context)
    hidden, _ = llama(context_T, training_rows(MODEL, jnp.arange(len(context_T))))
    logits_V = llama.logits(hidden)[-1]
    assert regret(call.context, [int(logits_V.argmin())], MODEL, params) == pytest.approx(np.ptp(logits_V), rel=1e-4)
