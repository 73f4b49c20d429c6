"""The CPU's own kernels equal what XLA computes, row by row and lane by lane, and their absence is no failure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.kernels import cpu
from apr_jax.kernels.cpu import CpuPagedAttention, bindings, build
from apr_jax.model.ops import apply_rope
from apr_jax.model.paged_attention import PagedAttention, Places
from apr_jax.model.rope import Frequencies, rope_angles
from apr_jax.model.sampling import log_probs, sample

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not build.is_available(), reason="no C++ compiler here")]


DTYPES = ("float32", "bfloat16")


def normal(*shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def to_panels(matrix_DF):
    return bindings.to_panels(matrix_DF, paired=matrix_DF.dtype == jnp.bfloat16)


def product(x, panels, outputs, dtype=None):
    return bindings.products(x, [panels], [outputs], dtype)[0]


def in_float64(*arrays):
    return [np.asarray(array.astype("float32"), np.float64) for array in arrays]


def assert_close(made, expected, atol):
    """To the tolerance, and in bfloat16 to the rounding of the result."""
    rounding = 2.0**-8 if made.dtype == jnp.bfloat16 else 0.0
    np.testing.assert_allclose(*in_float64(made, jnp.asarray(expected)), atol=atol, rtol=rounding)


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """The decode kernels as they are on a CPU without AVX, under names of their own."""
    folder, targets = tmp_path_factory.mktemp("portable"), set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "_folder", lambda: folder)
        patched.setattr(build, "_FLAGS", tuple(flag for flag in build._FLAGS if flag != "-march=native"))
        decode = {source: names for source, names in build._TARGETS.items() if source.name != "attention_rows.cc"}
        patched.setattr(build, "_TARGETS", decode)
        for source, library in build.made().items():
            for name in decode[source]:
                target = jax.ffi.pycapsule(getattr(library, name))
                jax.ffi.register_ffi_target(f"portable_{name}", target, platform="cpu")
                targets.add(name)
    return targets


@pytest.fixture(params=["this CPU's", "any CPU's"])
def kernels(request, monkeypatch):
    """Both ways to compile them: what is written for AVX-512 has a plain way beside it."""
    if request.param == "any CPU's":
        targets, call = request.getfixturevalue("portable"), build.call

        def call_portable(name, *more, **how):
            return call(f"portable_{name}" if name in targets else name, *more, **how)

        monkeypatch.setattr(build, "call", call_portable)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 16), (33, 40), (192, 100), (1024, 192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_a_product(kernels, rows, inputs, outputs, dtype):
    """In bfloat16 as well, since sums are taken in float32 and rounded once."""
    x_MD, matrix_DF = normal(rows, inputs, dtype=dtype), normal(inputs, outputs, seed=1, dtype=dtype)
    made = product(x_MD, to_panels(matrix_DF), outputs, jnp.float32)
    np.testing.assert_allclose(made, np.matmul(*in_float64(x_MD, matrix_DF)), atol=1e-6 * inputs + 1e-6, rtol=0)
    np.testing.assert_array_equal(product(x_MD, to_panels(matrix_DF), outputs), made.astype(dtype))


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_matrices_at_once_change_no_bit(kernels, rows, dtype):
    x_MD = normal(rows, 100, dtype=dtype)
    panels = [to_panels(normal(100, width, seed=width, dtype=dtype)) for width in (192, 7, 300)]
    together = bindings.products(x_MD, panels, [192, 7, 300])
    for made, each, width in zip(together, panels, (192, 7, 300), strict=True):
        np.testing.assert_array_equal(made, product(x_MD, each, width))


def from_panels(panels: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """The matrix `[inputs, outputs]` of which these are the panels."""
    steps, depth = panels.shape[1], panels.shape[2] // 16
    split = panels.reshape(-1, steps, 16, depth)
    return split.transpose(1, 3, 0, 2).reshape(steps * depth, -1)[:inputs, :outputs]


def test_panels_and_back():
    matrix_DF = normal(5, 37)
    panels = bindings.to_panels(matrix_DF)
    assert panels.shape == bindings.panels_shape(5, 37) == (3, 5, 16)
    np.testing.assert_array_equal(panels[1, 2], matrix_DF[2, 16:32])
    np.testing.assert_array_equal(panels[2, :, 5:], 0)
    np.testing.assert_array_equal(from_panels(panels, 5, 37), matrix_DF)
    paired = bindings.to_panels(matrix_DF, paired=True)
    assert paired.shape == bindings.panels_shape(5, 37, paired=True) == (3, 3, 32)
    np.testing.assert_array_equal(paired[1, 1].reshape(16, 2), matrix_DF[2:4, 16:32].T)
    np.testing.assert_array_equal(paired[:, 2, 1::2], 0)
    np.testing.assert_array_equal(from_panels(paired, 5, 37), matrix_DF)


def test_dtypes_that_differ_are_refused():
    x_MD, panels = normal(2, 4, dtype="bfloat16"), bindings.to_panels(normal(4, 16))
    with pytest.raises(Exception, match="x and the matrix must have one dtype"):
        product(x_MD, panels, 16)
    q_LNH, pages = normal(1, 1, 32, dtype="bfloat16"), normal(2, 1, 16, 32)
    with pytest.raises(Exception, match="must have one dtype"):
        bindings.write_then_attend(q_LNH, q_LNH, q_LNH, (pages, pages), jnp.array([1]), jnp.array([[1]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_depends_on_no_other_and_not_on_their_number(kernels, dtype):
    x_MD, panels = normal(40, 100, dtype=dtype), to_panels(normal(100, 50, seed=1, dtype=dtype))
    together = np.asarray(product(x_MD, panels, 50))
    for rows in (1, 2, 7, 16, 23):
        assert np.asarray(product(x_MD[:rows], panels, 50)).tobytes() == together[:rows].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(monkeypatch, dtype):
    x_MD, panels = normal(70, 300, dtype=dtype), to_panels(normal(300, 500, seed=1, dtype=dtype))
    results = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(build, "threads", lambda threads=threads: np.int64(threads))
        results.add(np.asarray(product(x_MD, panels, 500)).tobytes())
    assert len(results) == 1


def test_lifted_over_lanes_it_is_one_product():
    x_LTD, matrix_DF = normal(6, 3, 20), normal(20, 18, seed=1)
    lifted = jax.jit(jax.vmap(product, in_axes=(0, None, None)), static_argnums=2)
    panels = bindings.to_panels(matrix_DF)
    np.testing.assert_allclose(lifted(x_LTD, panels, 18), jnp.einsum("LTD,DF->LTF", x_LTD, matrix_DF), atol=1e-5)
    assert lifted.lower(x_LTD, panels, 18).as_text().count("apr_product") == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_rope(kernels, dtype):
    """Alone and lifted over lanes."""
    x_LTNH, positions_LT = normal(4, 2, 3, 8, dtype=dtype), jnp.arange(8).reshape(4, 2) * 37
    angles = rope_angles(positions_LT, Frequencies(8, 1e4))
    expected = apply_rope(x_LTNH.astype("float32"), angles)
    for rotate in (bindings.rotate, jax.vmap(bindings.rotate)):
        made = rotate(x_LTNH.reshape(4, 2, 24), angles)
        assert made.dtype.name == dtype
        assert_close(made.reshape(4, 2, 3, 8), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_norms_lifted_over_lanes(kernels, dtype):
    x_LTW, scale_D = (8 * normal(5, 1, 2 * 18)).astype(dtype), normal(36, seed=1)
    x_f32 = x_LTW.astype("float32")
    gate, up = jnp.split(x_f32, 2, axis=-1)
    made = jax.vmap(bindings.swiglu)(*jnp.split(x_LTW, 2, axis=-1))
    assert_close(made, jax.nn.silu(gate) * up, atol=1e-3)
    normed = jax.vmap(bindings.rms_norm, in_axes=(0, None, None))(x_LTW, scale_D, 1e-6)
    mean_square = jnp.mean(x_f32**2, axis=-1, keepdims=True)
    assert_close(normed, x_f32 / jnp.sqrt(mean_square + 1e-6) * scale_D[None, None], atol=1e-5)


def test_what_is_no_number_stays_none(kernels):
    """Also where the rounding to bfloat16 would carry into the sign."""
    bits = jnp.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F800000], jnp.uint32)
    panels = to_panels(jnp.ones((1, 16), "bfloat16"))
    values = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)[:, None]
    made = product(values, panels, 16)
    assert np.isnan(made[:3].astype("float32")).all()
    assert np.isinf(made[3].astype("float32")).all()


@pytest.mark.parametrize("size", [1, 7, 256, 336, 1_000])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_draws_are_those_of_the_sampling_policy(size, temperature):
    """The same tokens but where the uniform number falls on a boundary, to rounding; the same log-probabilities."""
    lanes = 500
    logits_LV, uniforms_L = 3 * normal(lanes, size), jax.random.uniform(jax.random.key(1), (lanes,))
    banned_V = (jnp.arange(size) % 3 == 1) & (size > 1)
    logprobs_LV = log_probs(logits_LV, temperature, banned_V)
    expected_L = jax.vmap(lambda x, u: sample(x, u, temperature))(logprobs_LV, uniforms_L)
    lifted = jax.vmap(bindings.draw, in_axes=(0, None, None, 0))
    token_L, logprob_L = lifted(logits_LV, jnp.float32(temperature), banned_V, uniforms_L)
    np.testing.assert_allclose(logprob_L, logprobs_LV[jnp.arange(lanes), token_L], rtol=1e-5, atol=2e-6)
    assert not banned_V[token_L].any()
    cdf_LV = jnp.cumsum(jnp.exp(logprobs_LV), axis=1)
    for lane in np.flatnonzero(token_L != expected_L):
        assert temperature > 0
        assert np.abs(cdf_LV[lane] - uniforms_L[lane]).min() < 1e-6
    alone = bindings.draw(logits_LV[3], jnp.float32(temperature), banned_V, uniforms_L[3])
    assert (alone[0], alone[1]) == (token_L[3], logprob_L[3])


def test_the_ends_of_the_interval_are_tokens_that_can_be():
    """Uniform numbers 0 and just below 1, where first and last tokens are banned or hardly ever drawn."""
    logits_V = jnp.full((600,), -200.0).at[jnp.array([5, 300, 580])].set(jnp.array([0.0, 1.0, 2.0]))
    banned_V = jnp.zeros((600,), bool).at[580].set(True)
    for uniform, token in ((0.0, 5), (0.26, 5), (0.28, 300), (np.nextafter(np.float32(1), np.float32(0)), 300)):
        assert bindings.draw(logits_V, jnp.float32(1), banned_V, jnp.float32(uniform))[0] == token
    assert bindings.draw(logits_V, jnp.float32(0), banned_V, jnp.float32(0.9))[0] == 300


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 128])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_pages_is_xlas(kernels, head_dim, groups, dtype):
    """Rows of 0, 1, 16, 17 and 63 positions before the new one, over shuffled pages; one lane is not live."""
    kv_heads, page, row = 2, 16, 4
    lengths_L, live_L = jnp.array([0, 1, 16, 17, 63, 5]), jnp.array([True] * 5 + [False])
    tables_LR = 1 + jnp.asarray(np.random.default_rng(0).permutation(6 * row).reshape(6, row), jnp.int32)
    arrays = [normal(6, n, head_dim, seed=n, dtype=dtype) for n in (kv_heads * groups, kv_heads, kv_heads)]
    arrays += [normal(6 * row + 1, kv_heads, page, head_dim, seed=seed, dtype=dtype) for seed in (7, 8)]
    made, expected = (
        jax.tree.leaves(attend(q_LNH, k_LKH, v_LKH, (k_pages, v_pages), Places(lengths_L, live_L, tables_LR)))
        for attend, (q_LNH, k_LKH, v_LKH, k_pages, v_pages) in (
            (CpuPagedAttention(), arrays),
            (PagedAttention(), [array.astype("float32") for array in arrays]),
        )
    )
    assert {array.dtype.name for array in made} == {dtype}
    assert_close(made[0], expected[0], atol=2e-6)
    for ours, theirs in zip(made[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(ours[1:], theirs[1:])  # page 0 is trash
    np.testing.assert_array_equal(made[0][5], 0)


def test_scores_of_any_size_are_a_softmax():
    """Also where all but one weight vanish, or all scores are alike."""
    tables_LR, seen_L, v_pages = jnp.array([[1, 2]]), jnp.array([20]), normal(3, 1, 16, 32, seed=2)
    for scale in (0.0, 1.0, 100.0, 1e4):
        q_LNH, k_pages = scale * normal(1, 1, 32), normal(3, 1, 16, 32, seed=1)
        new_k, new_v = k_pages[2, :, 3][None], v_pages[2, :, 3][None]
        out, *_ = bindings.write_then_attend(q_LNH, new_k, new_v, (k_pages, v_pages), seen_L, tables_LR)
        k_SH, v_SH = (np.asarray(pages[1:, 0].reshape(32, 32)[:20], np.float64) for pages in (k_pages, v_pages))
        scores = k_SH @ np.asarray(q_LNH[0, 0], np.float64) / 32**0.5
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(out[0, 0], weights @ v_SH / weights.sum(), atol=2e-5)


def test_lanes_may_be_neighbouring_positions_of_one_row():
    """As prefill has them: each sees those before it that the same call writes."""
    positions, tables_R = 20, jnp.array([2, 1], jnp.int32)
    q_LNH, k_LKH, v_LKH = (normal(positions, 2, 32, seed=seed) for seed in range(3))
    empty = jnp.full((3, 2, 16, 32), 9.0)
    seen_L, tables_LR = 1 + jnp.arange(positions, dtype=jnp.int32), jnp.tile(tables_R, (positions, 1))
    out_LNH, *_ = bindings.write_then_attend(q_LNH, k_LKH, v_LKH, (empty, empty), seen_L, tables_LR)
    scores = jnp.einsum("LKH,SKH->KLS", q_LNH, k_LKH) / 32**0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(positions, dtype=bool)[None], scores, -jnp.inf), axis=-1)
    np.testing.assert_allclose(out_LNH, jnp.einsum("KLS,SKH->LKH", weights, v_LKH), atol=2e-6)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked yet, with an empty folder for what is compiled."""
    monkeypatch.setattr(build, "_folder", lambda: tmp_path / "native")
    for module in (build, cpu):
        monkeypatch.setattr(module, "is_available", functools.cache(build.is_available.__wrapped__))
    return tmp_path / "native"


@pytest.mark.parametrize("page", [1, 5, 16, 48])
def test_pages_of_any_size_hold_the_same_row(kernels, page):
    """A row of 61 positions in pages that whole vectors of positions fill, or don't."""
    length, head_dim = 61, 64
    q_LNH, *new = (normal(1, 1, head_dim, seed=seed) for seed in range(3))
    count = -(-length // page)
    rows = [normal(length, head_dim, seed=seed).at[-1].set(last[0, 0]) for seed, last in zip((3, 4), new, strict=True)]
    pages = [
        jnp.pad(row, ((0, count * page - length), (0, 0)), constant_values=1e30).reshape(count, 1, page, head_dim)
        for row in rows
    ]
    out, *_ = bindings.write_then_attend(
        q_LNH, *new, (pages[0], pages[1]), jnp.array([length]), jnp.arange(count)[None]
    )  # type: ignore[call-arg]
    weights = jax.nn.softmax(rows[0] @ q_LNH[0, 0] / head_dim**0.5)
    np.testing.assert_allclose(out[0, 0], weights @ rows[1], atol=2e-6)
