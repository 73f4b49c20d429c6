"""Training attention by the CPU's kernels equals plain softmax attention, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import MeshConfig
from apr_jax.kernels import cpu
from apr_jax.kernels.cpu import build
from apr_jax.kernels.cpu.attention import training_attention
from apr_jax.model.attention import xla_attention
from apr_jax.parallel.mesh import make_mesh
from tests.model.dense import (
    assert_all_close,
    assert_branches_that_have_ended_are_not_seen,
    assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment,
    assert_memory_is_linear,
    out_and_grads,
    plain_attention,
    random_inputs,
)

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler here")]


@pytest.mark.parametrize(
    ("T", "N", "K", "H"), [(1, 2, 2, 16), (100, 4, 2, 32), (128, 3, 3, 64), (300, 4, 1, 80), (1100, 2, 1, 16)]
)
def test_equals_plain_attention(T: int, N: int, K: int, H: int) -> None:
    inputs = random_inputs(2, T, N, K, H)
    assert_all_close(out_and_grads(training_attention, *inputs), out_and_grads(plain_attention, *inputs))


@pytest.mark.parametrize("T", [90, 300, 1100])
def test_branches_that_have_ended_are_not_seen(T: int) -> None:
    assert_branches_that_have_ended_are_not_seen(training_attention, T)


def test_scores_may_be_of_any_size() -> None:
    """Also where all but one weight vanish."""
    q_BTNH, *others = random_inputs(2, 64, 2, 1, 16)
    for scale in (0.0, 30.0, 1e4):
        inputs = (scale * q_BTNH, *others)
        out_BTNH, *grads = out_and_grads(training_attention, *inputs)
        np.testing.assert_allclose(out_BTNH, plain_attention(*inputs), atol=1e-4)
        assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_threads_and_other_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(3, 80, 4, 2, 16)
    results = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(build, "threads", lambda threads=threads: np.int64(threads))
        results.add(b"".join(np.asarray(x[1]).tobytes() for x in out_and_grads(training_attention, *inputs)))
    alone = out_and_grads(training_attention, *(x[1:2] for x in inputs))
    results.add(b"".join(np.asarray(x[0]).tobytes() for x in alone))
    assert len(results) == 1


def test_a_row_may_be_one_segment() -> None:
    *inputs, ids_BT = random_inputs(2, 160, 2, 1, 16)
    ids_BT = jnp.ones_like(ids_BT).at[1].set(ids_BT[1])
    made = out_and_grads(training_attention, *inputs, ids_BT)
    assert_all_close(made, out_and_grads(plain_attention, *inputs, ids_BT))


def test_gradients_flow_only_from_earlier_tokens_of_the_own_segment() -> None:
    assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment(training_attention)


def test_memory_of_a_long_row_is_far_below_its_square() -> None:
    assert_memory_is_linear(training_attention)


def test_it_is_mapped_over_the_mesh() -> None:
    inputs = random_inputs(4, 128, 4, 2, 16)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        ours = jax.jit(training_attention)(*inputs)
    np.testing.assert_allclose(ours, xla_attention(*inputs), atol=2e-5)
