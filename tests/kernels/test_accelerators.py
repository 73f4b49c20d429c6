"""Training attention on TPUs and GPUs: Pallas' splash in interpret mode, and what lowers for which platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import ConfigError, MeshConfig
from apr_jax.data.segments import with_lengths
from apr_jax.kernels.gpu.cudnn import cudnn_attention, offsets_of, packed_attention, takes_lengths
from apr_jax.kernels.tpu.splash import splash_attention
from apr_jax.model.attention import xla_attention
from apr_jax.parallel.mesh import make_mesh
from tests.model.dense import (
    assert_all_close,
    assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment,
    out_and_grads,
    random_inputs,
)

pytestmark = pytest.mark.heavy

interpreted = functools.partial(splash_attention, interpret=True)


@pytest.mark.parametrize(("T", "N", "K"), [(128, 2, 2), (200, 2, 1)])
def test_splash_in_interpret_mode_equals_xla(T: int, N: int, K: int) -> None:
    inputs = random_inputs(2, T, N, K, 16)
    assert_all_close(out_and_grads(interpreted, *inputs), out_and_grads(xla_attention, *inputs))


def test_splashs_gradients_flow_only_from_earlier_tokens_of_the_own_segment() -> None:
    assert_gradients_flow_only_from_earlier_tokens_of_the_own_segment(interpreted)


def test_splash_is_mapped_over_the_mesh() -> None:
    inputs = random_inputs(4, 128, 4, 2, 16)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        ours = jax.jit(interpreted)(*inputs)
    np.testing.assert_allclose(ours, xla_attention(*inputs), atol=2e-5)


def test_splash_has_no_branches() -> None:
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(1, 128, 2, 2, 16)
    with pytest.raises(ConfigError, match="not their branches"):
        splash_attention(q_BTNH, k_BTKH, v_BTKH, ids_BT, jnp.ones_like(ids_BT))


def test_splash_lowers_for_tpu() -> None:
    lowered = jax.jit(lambda *a: out_and_grads(splash_attention, *a)).trace(*random_inputs(2, 256, 4, 2, 64))
    assert "tpu_custom_call" in lowered.lower(lowering_platforms=("tpu",)).as_text()


def test_cudnn_lowers_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)  # as on a machine that has cuDNN
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(2, 255, 4, 2, 64)
    halves = [array.astype(jnp.bfloat16) for array in (q_BTNH, k_BTKH, v_BTKH)]
    traced = jax.jit(lambda *a: out_and_grads(cudnn_attention, *a)).trace(*halves, ids_BT)
    assert "cudnn" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_gets_packed_segments_by_their_offsets_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    assert not takes_lengths(), "there is no GPU here"
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)  # as on a machine that has an H100
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    assert takes_lengths()
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(3, 256, 4, 2, 64)
    lengths_BM = jnp.asarray(with_lengths({"segment_ids": np.asarray(ids_BT)}, 1)["lengths"])
    halves = [array.astype(jnp.bfloat16) for array in (q_BTNH, k_BTKH, v_BTKH)]
    traced = jax.jit(lambda *a: out_and_grads(packed_attention, *a)).trace(*halves, lengths_BM)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text
    assert "256x256" not in text


def test_offsets_become_those_that_cudnn_takes() -> None:
    """JAX's own arithmetic on them gives each segment's first element and its length, in order."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    ids_BT = np.asarray(random_inputs(5, 64, 2, 2, 8)[3])
    packed = with_lengths({"segment_ids": ids_BT}, 1)
    begins = np.flatnonzero(np.diff(packed["segment_ids"], axis=1, prepend=-1).reshape(-1))
    offsets, lengths = offsets_of(jnp.asarray(packed["lengths"]), 64)
    heads = jnp.zeros((5, 64, 2, 8))
    found = fused._fix_seqlen_offsets(lengths, lengths, offsets, offsets, heads, heads)
    for seqlen, offset in ((found[0], found[2]), (found[1], found[3])):
        np.testing.assert_array_equal(seqlen.reshape(-1)[: len(begins)], np.diff(begins, append=5 * 64))
        np.testing.assert_array_equal(offset.reshape(-1)[: len(begins)], begins * 2 * 8)
        assert (offset.reshape(-1)[len(begins) :] == 5 * 64 * 2 * 8).all()
