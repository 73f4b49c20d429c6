"""Attention of training rows by XLA equals plain softmax attention, with its gradients."""

import jax.numpy as jnp
import pytest

from apr_jax.model.attention import xla_attention
from tests.model.dense import (
    assert_all_close,
    assert_branches_that_have_ended_are_not_seen,
    assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment,
    assert_memory_is_linear,
    out_and_grads,
    plain_attention,
    random_inputs,
)

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(("T", "N", "K"), [(1, 2, 2), (100, 4, 2), (128, 3, 3), (300, 4, 1), (1100, 2, 1)])
def test_equals_plain_attention(T: int, N: int, K: int) -> None:
    inputs = random_inputs(2, T, N, K, 8)
    assert_all_close(out_and_grads(xla_attention, *inputs), out_and_grads(plain_attention, *inputs))


@pytest.mark.parametrize("T", [90, 300, 1100])
def test_branches_that_have_ended_are_not_seen(T: int) -> None:
    assert_branches_that_have_ended_are_not_seen(xla_attention, T)


def test_a_row_may_be_one_segment() -> None:
    *inputs, ids_BT = random_inputs(2, 160, 2, 1, 16)
    ids_BT = jnp.ones_like(ids_BT).at[1].set(ids_BT[1])
    assert_all_close(out_and_grads(xla_attention, *inputs, ids_BT), out_and_grads(plain_attention, *inputs, ids_BT))


def test_in_bfloat16_it_is_as_close_as_bfloat16_is() -> None:
    *inputs, ids_BT = random_inputs(2, 100, 4, 2, 16)
    halves = [x.astype(jnp.bfloat16) for x in inputs]
    ours = out_and_grads(xla_attention, *halves, ids_BT)
    assert {x.dtype for x in ours} == {jnp.dtype("bfloat16")}
    exact = out_and_grads(plain_attention, *(x.astype(jnp.float32) for x in halves), ids_BT)
    assert_all_close([x.astype(jnp.float32) for x in ours], exact, atol=0.04)


def test_gradients_flow_only_from_earlier_tokens_of_the_own_segment() -> None:
    assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment(xla_attention)


def test_memory_of_a_long_row_is_far_below_its_square() -> None:
    assert_memory_is_linear(xla_attention)
