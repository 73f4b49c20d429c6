"""Training's kernels equal what XLA computes, with their gradients, alone and over every kind of mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import MeshConfig
from apr_jax.kernels import cpu
from apr_jax.kernels.cpu import bindings, build
from apr_jax.kernels.cpu.ops import norm, product, rope, swiglu
from apr_jax.model.ops import apply_rope
from apr_jax.model.rope import Frequencies, rope_angles
from apr_jax.parallel.mesh import make_mesh

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler here")]


def out_and_grads(gate, up):
    out, pull_back = jax.vjp(swiglu, gate, up)
    return out, *pull_back(jnp.ones_like(out))


def expected(gate, up):
    gate, up = (np.asarray(x, np.float64) for x in (gate, up))
    sigmoid = 1 / (1 + np.exp(-np.maximum(gate, -80)))
    return gate * sigmoid * up, up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid


def wide(*shape, seed=0):
    """Of every size that a gate may have."""
    return 30.0 * jax.random.normal(jax.random.key(seed), shape) ** 3


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 128, 96)])
def test_equals_silu_times_up(shape):
    gate, up = wide(*shape), wide(*shape, seed=1)
    for ours, exact in zip(jax.jit(out_and_grads)(gate, up), expected(gate, up), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def test_is_split_as_the_batch_and_the_mlp_are():
    gate, up = wide(4, 6, 8), wide(4, 6, 8, seed=1)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        split = jax.jit(out_and_grads)(gate, up)
    for ours, exact in zip(split, expected(gate, up), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def product_and_grads(x, matrix):
    out, pull_back = jax.vjp(product, x, matrix)
    return out, *pull_back(jnp.sin(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape)))


def assert_product(made, x, matrix):
    x, matrix = (np.asarray(value, np.float64) for value in (x, matrix))
    out = x @ matrix
    dout = np.sin(np.arange(out.size).reshape(out.shape))
    exact = out, dout @ matrix.T, np.einsum("BTD,BTF->DF", x, dout)
    for ours, value in zip(made, exact, strict=True):
        np.testing.assert_allclose(ours, value, atol=2e-4)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(1, 1), (2, 16), (3, 100), (2, 300)])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 160), (7, 16), (16, 9)])
def test_a_product_and_its_gradients(shape, inputs, outputs):
    x, matrix = normal(*shape, inputs), normal(inputs, outputs, seed=1)
    assert_product(jax.jit(product_and_grads)(x, matrix), x, matrix)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=4, fsdp=1, tensor=1), MeshConfig(data=2, fsdp=2, tensor=1), MeshConfig(data=2, fsdp=1, tensor=2)],
)
def test_a_product_over_a_mesh(mesh):
    x, matrix = normal(4, 6, 32), normal(32, 64, seed=1)
    with jax.set_mesh(make_mesh(mesh)):
        made = jax.jit(product_and_grads)(x, matrix)
    assert_product(made, x, matrix)


def norm_and_grads(x, scale, dthrough, dnormed):
    out, pull_back = jax.vjp(lambda x, scale: norm(x, scale, 1e-3), x, scale)
    return *out, *pull_back((dthrough, dnormed))


def plain_norm(x, scale):
    return x, x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * scale[None, None]


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 70, 48), (4, 5, 7)])
def test_a_norm_and_what_goes_past_it(shape, mesh):
    x, dthrough, dnormed = (normal(*shape, seed=seed) for seed in range(3))
    scale = 1 + 0.1 * normal(shape[-1], seed=3)
    with contextlib.ExitStack() as stack:
        if mesh:
            stack.enter_context(jax.set_mesh(make_mesh(mesh)))
        made = jax.jit(norm_and_grads)(x, scale, dthrough, dnormed)
    out, pull_back = jax.vjp(plain_norm, x, scale)
    for ours, exact in zip(made, (*out, *pull_back((dthrough, dnormed))), strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_rotation_is_ropes(mesh):
    x_BTNH, dout_BTNH = normal(4, 10, 2, 8), normal(4, 10, 2, 8, seed=1)
    angles = rope_angles(3 * jnp.arange(40).reshape(4, 10), Frequencies(8, 100.0))
    with contextlib.ExitStack() as stack:
        if mesh:
            stack.enter_context(jax.set_mesh(make_mesh(mesh)))
        made = jax.jit(lambda x, dout: (rope(x, angles), jax.vjp(lambda x: rope(x, angles), x)[1](dout)[0]))(
            x_BTNH, dout_BTNH
        )
    exact, pull_back = jax.vjp(lambda x: apply_rope(x, angles), x_BTNH)
    np.testing.assert_allclose(made[0], exact, atol=1e-5)
    np.testing.assert_allclose(made[1], pull_back(dout_BTNH)[0], atol=1e-5)


def test_a_scales_gradient_is_the_same_with_any_number_of_threads(monkeypatch):
    x, dout, given = (normal(3, 100, 48, seed=seed) for seed in range(3))
    results = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(build, "threads", lambda threads=threads: np.int64(threads))
        made = bindings.rms_norm_backward(x, normal(48, seed=3), dout, given, 1e-6)
        results.add(b"".join(np.asarray(value).tobytes() for value in made))
    assert len(results) == 1


def test_lifted_over_sequences_they_are_the_same():
    x_SBTD, matrix = normal(3, 2, 20, 32), 0.1 * normal(32, 32, seed=1)

    def both(x):
        out = product(norm(x, jnp.ones(32), 1e-6)[1], matrix)
        return jnp.sum(swiglu(out, 2 * out))

    lifted = jax.vmap(jax.grad(both))(x_SBTD)
    np.testing.assert_allclose(lifted, jnp.stack([jax.grad(both)(x_BTD) for x_BTD in x_SBTD]), atol=1e-4)


def test_a_matrixs_gradient_is_the_same_with_any_number_of_threads(monkeypatch):
    x_MD, y_MF = normal(300, 48), normal(300, 80, seed=1)
    results = set()
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(build, "threads", lambda threads=threads: np.int64(threads))
        results.add(np.asarray(bindings.outer(x_MD, y_MF)).tobytes())
    assert len(results) == 1


def test_a_matrix_whose_sizes_have_no_kernel_is_multiplied_by_xla():
    def text(*shapes):
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(product_and_grads).lower(*arguments).as_text()

    assert "apr_outer" in text((2, 4, 16), (16, 32))
    assert "apr_" not in text((2, 4, 16), (16, 9))
