"""Every kernel is causal, sees one segment only, and equals plain softmax attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import ConfigError, MeshConfig
from apr_jax.model import native
from apr_jax.model.attention import (
    choose_impl,
    cpu,
    cudnn_attention,
    self_attention,
    splash_attention,
    takes_branches,
    windows,
    xla_attention,
)
from apr_jax.model.window_attention import window_attention, window_lengths
from apr_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.heavy

compiled = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here")


def plain_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    seen_BTS: jax.Array | None = None,
) -> jax.Array:
    groups, T = q_BTNH.shape[2] // k_BTKH.shape[2], q_BTNH.shape[1]
    k_BSNH, v_BSNH = jnp.repeat(k_BTKH, groups, axis=2), jnp.repeat(v_BTKH, groups, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
    visible = jnp.tril(jnp.ones((T, T), bool))[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    visible = visible if seen_BTS is None else visible & seen_BTS
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)


def random_inputs(B: int, T: int, N: int, K: int, H: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(T), 4)
    q_BTNH = jax.random.normal(keys[0], (B, T, N, H))
    k_BTKH, v_BTKH = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
    starts_BT = jax.random.bernoulli(keys[3], 0.05, (B, T)).astype(jnp.int32)
    return q_BTNH, k_BTKH, v_BTKH, 1 + jnp.cumsum(starts_BT, axis=1)


def out_and_grads(attend: Any, *inputs: jax.Array) -> Any:
    def loss(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> Any:
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, ids_BT)
        return jnp.sum(jnp.sin(out_BTNH.astype(jnp.float32))), out_BTNH

    (_, out_BTNH), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out_BTNH, *grads


def assert_all_close(ours: Any, theirs: Any, atol: float = 2e-5, rtol: float = 1e-7) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=rtol)


@pytest.mark.parametrize("attend", [xla_attention, window_attention])
@pytest.mark.parametrize(("T", "N", "K"), [(1, 2, 2), (100, 4, 2), (128, 3, 3), (300, 4, 1), (1100, 2, 1)])
def test_equals_plain_attention(attend: Any, T: int, N: int, K: int) -> None:
    inputs = random_inputs(2, T, N, K, 8)
    assert_all_close(out_and_grads(attend, *inputs), out_and_grads(plain_attention, *inputs))


@compiled
@pytest.mark.parametrize(
    ("T", "N", "K", "H"), [(1, 2, 2, 16), (100, 4, 2, 32), (128, 3, 3, 64), (300, 4, 1, 80), (1100, 2, 1, 16)]
)
def test_the_cpus_kernels_equal_plain_attention(T: int, N: int, K: int, H: int) -> None:
    inputs = random_inputs(2, T, N, K, H)
    assert_all_close(out_and_grads(cpu, *inputs), out_and_grads(plain_attention, *inputs))


@pytest.mark.parametrize("impl", ["xla", "windows", pytest.param("cpu", marks=compiled)])
@pytest.mark.parametrize("T", [90, 300, 1100])
def test_branches_that_have_ended_are_not_seen(impl: str, T: int) -> None:
    """Each token reaches some way, not beyond those before it that are seen: as branches of a tree do."""
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(2, T, 4, 2, 16)
    ids_BT = jnp.where(jnp.arange(T)[None] < 200, ids_BT, 1_000)  # the last segment is a long one
    rng = np.random.default_rng(T)
    ends_BT = np.full((2, T), T)
    for row in range(2):
        for begin in range(0, T, 70):  # branches of branches: whatever begins in one ends with it at the latest
            for start in sorted(rng.integers(begin, min(begin + 70, T), 4)):
                end = min(start + int(rng.integers(1, 60)), *ends_BT[row, start : start + 1])
                ends_BT[row, start:end] = np.minimum(ends_BT[row, start:end], end)
    reach_BT = jnp.asarray(ends_BT - np.arange(T), jnp.int32)

    def plain(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        seen_BTS = jnp.arange(T)[None, :, None] < jnp.asarray(ends_BT)[:, None, :]
        return plain_attention(q_BTNH, k_BTKH, v_BTKH, ids_BT, seen_BTS)

    ours = functools.partial(_with_reach, reach_BT, impl)
    inputs = (q_BTNH, k_BTKH, v_BTKH, ids_BT)
    assert_all_close(out_and_grads(ours, *inputs), out_and_grads(plain, *inputs), rtol=1e-5)
    assert not np.allclose(ours(*inputs), plain_attention(*inputs), atol=1e-2)


def _with_reach(reach_BT: jax.Array, impl: str, *inputs: jax.Array) -> jax.Array:
    return self_attention(*inputs[:3], segment_ids_BT=inputs[3], reach_BT=reach_BT, impl=impl)


def test_splash_has_no_branches() -> None:
    *inputs, ids_BT = random_inputs(1, 128, 2, 2, 16)
    assert not takes_branches("auto", "tpu", jnp.dtype("bfloat16"), 64)
    assert takes_branches("auto", "cpu", jnp.dtype("float32"), 64)
    with pytest.raises(ConfigError, match="not their branches"):
        _with_reach(jnp.ones_like(ids_BT), "splash", *inputs, ids_BT)


@compiled
def test_the_cpus_kernels_take_scores_of_any_size() -> None:
    """Also where all but one weight vanish."""
    q_BTNH, *others = random_inputs(2, 64, 2, 1, 16)
    for scale in (0.0, 30.0, 1e4):
        inputs = (scale * q_BTNH, *others)
        out_BTNH, *grads = out_and_grads(cpu, *inputs)
        np.testing.assert_allclose(out_BTNH, plain_attention(*inputs), atol=1e-4)
        assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


@compiled
def test_threads_and_other_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(3, 80, 4, 2, 16)
    results = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "_threads", lambda threads=threads: np.int64(threads))
        results.add(b"".join(np.asarray(x[1]).tobytes() for x in out_and_grads(cpu, *inputs)))
    results.add(b"".join(np.asarray(x[0]).tobytes() for x in out_and_grads(cpu, *(x[1:2] for x in inputs))))
    assert len(results) == 1


def test_the_cpus_kernels_say_what_they_take() -> None:
    with pytest.raises(ConfigError, match=r"model\.head_dim=8\. Choose 'auto'"):
        cpu(*random_inputs(1, 16, 1, 1, 8))


@pytest.mark.parametrize("attend", [window_attention, pytest.param(cpu, marks=compiled)])
def test_a_row_may_be_one_segment(attend: Any) -> None:
    *inputs, ids_BT = random_inputs(2, 160, 2, 1, 16)
    ids_BT = jnp.ones_like(ids_BT).at[1].set(ids_BT[1])
    assert_all_close(out_and_grads(attend, *inputs, ids_BT), out_and_grads(plain_attention, *inputs, ids_BT))


@pytest.mark.parametrize(("T", "lengths"), [(32, (32,)), (512, (32, 64, 96, 128, 192, 256, 384, 512))])
def test_windows_have_few_lengths(T: int, lengths: tuple[int, ...]) -> None:
    assert window_lengths(T) == lengths


def test_windows_in_bfloat16_are_as_close_as_bfloat16_is() -> None:
    *inputs, ids_BT = random_inputs(2, 100, 4, 2, 16)
    halves = [x.astype(jnp.bfloat16) for x in inputs]
    ours = out_and_grads(window_attention, *halves, ids_BT)
    assert {x.dtype for x in ours} == {jnp.dtype("bfloat16")}
    assert_all_close(
        [x.astype(jnp.float32) for x in ours],
        out_and_grads(plain_attention, *(x.astype(jnp.float32) for x in halves), ids_BT),
        atol=0.04,
    )


def test_no_segment_ids_is_one_segment() -> None:
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(2, 20, 2, 2, 4)
    assert len(np.unique(ids_BT)) > 1
    out_BTNH = self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=None, impl="xla")
    np.testing.assert_allclose(out_BTNH, plain_attention(q_BTNH, k_BTKH, v_BTKH, jnp.ones_like(ids_BT)), atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "windows", "splash", pytest.param("cpu", marks=compiled)])
def test_gradients_flow_only_from_earlier_tokens_of_the_own_segment(impl: str) -> None:
    q_BTNH, k_BTKH, v_BTKH, _ = random_inputs(1, 160, 2, 1, 16)
    ids_BT = jnp.asarray([[1] * 40 + [2] * 100 + [0] * 20])  # the second segment crosses a block's border
    kernels: dict[str, Any] = {
        "xla": xla_attention,
        "windows": window_attention,
        "splash": functools.partial(splash_attention, interpret=True),
        "cpu": cpu,
    }
    attend = kernels[impl]

    @jax.jit
    def influence(t: jax.Array) -> jax.Array:
        """How far the output at t depends on the keys and values at each s."""

        def out(k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            return jnp.sum(jax.lax.dynamic_index_in_dim(attend(q_BTNH, k_BTKH, v_BTKH, ids_BT), t, 1))

        grads = jax.grad(out, argnums=(0, 1))(k_BTKH, v_BTKH)
        return sum((jnp.sum(jnp.abs(grad), axis=(0, 2, 3)) for grad in grads), start=jnp.zeros(160))

    for t in (0, 39, 40, 130, 139, 150):
        s = np.arange(160)
        visible = (s <= t) & (np.asarray(ids_BT[0]) == np.asarray(ids_BT[0, t]))
        np.testing.assert_array_equal(np.asarray(influence(t)) > 0, visible)


@pytest.mark.parametrize("attend", [xla_attention, window_attention, pytest.param(cpu, marks=compiled)])
def test_memory_of_a_long_row_is_far_below_its_square(attend: Any) -> None:
    def temporary_bytes(T: int) -> int:
        inputs = [jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, T), jnp.int32)]
        grad = jax.grad(lambda *args: jnp.sum(attend(*args)), argnums=(0, 1, 2))
        return int(jax.jit(grad).lower(*inputs).compile().memory_analysis().temp_size_in_bytes)

    assert temporary_bytes(4096) < 2.5 * temporary_bytes(2048)  # linear in T
    assert temporary_bytes(4096) < 4 * 4 * 4096**2 / 4  # a quarter of one float32 matrix [N, T, T]


@pytest.mark.parametrize(("T", "N", "K"), [(128, 2, 2), (200, 2, 1)])
def test_splash_in_interpret_mode_equals_xla(T: int, N: int, K: int) -> None:
    inputs = random_inputs(2, T, N, K, 16)
    ours = out_and_grads(functools.partial(splash_attention, interpret=True), *inputs)
    assert_all_close(ours, out_and_grads(xla_attention, *inputs))


@pytest.mark.parametrize(
    "attend", [functools.partial(splash_attention, interpret=True), windows, pytest.param(cpu, marks=compiled)]
)
def test_kernels_are_mapped_over_the_mesh(attend: Any) -> None:
    inputs = random_inputs(4, 128, 4, 2, 16)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        ours = jax.jit(attend)(*inputs)
    np.testing.assert_allclose(ours, xla_attention(*inputs), atol=2e-5)


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


def test_cudnn_refuses_float32() -> None:
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(1, 8, 1, 1, 8)
    with pytest.raises(ConfigError, match=r"model\.compute_dtype='float32'"):
        self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT, impl="cudnn")


def test_auto_picks_by_backend() -> None:
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert choose_impl("cpu", bfloat16, 64) == choose_impl("cpu", float32, 8) == "windows"
    assert choose_impl("cpu", float32, 64) == ("cpu" if native.is_available() else "windows")
    assert choose_impl("tpu", float32, 64) == "splash"
    assert choose_impl("gpu", bfloat16, 64) == "cudnn"
    assert choose_impl("gpu", float32, 64) == choose_impl("gpu", bfloat16, 60) == "xla"
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(1, 8, 1, 1, 8)
    auto = self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT)
    np.testing.assert_array_equal(auto, self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT, impl="windows"))


def test_bad_arguments_are_named() -> None:
    q_BTNH, k_BTKH, v_BTKH, ids_BT = random_inputs(1, 8, 2, 2, 8)
    with pytest.raises(ValueError, match="choose one of"):
        self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT, impl="flash")
    with pytest.raises(ValueError, match="do not fit together"):
        self_attention(q_BTNH, k_BTKH[:, :4], v_BTKH, segment_ids_BT=ids_BT)
    with pytest.raises(ValueError, match="segment ids"):
        self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT[:, :4])
