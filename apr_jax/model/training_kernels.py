"""What a layer computes in training beside attention: with the kernels of `native.py` in float32 on a CPU, else by XLA.

XLA's CPU backend multiplies at the machine's limit but for a matrix's gradient, and goes through memory once more for
each of the parts between two products. Each function is for activations whose rows are split over the ambient mesh;
which of them take a kernel is told by their rank, so that the engine's, which has no batch axis, never do. Letters of
shapes are in `llama.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.model import native
from apr_jax.model.rope import Angles, apply_rope
from apr_jax.parallel.mesh import BATCH_AXES, FSDP_AXIS, TENSOR_AXIS, ambient_platform, over_mesh, partition_spec

_BLOCK = 16  # of the kernels
_ROWS, _WHOLE = partition_spec(BATCH_AXES), partition_spec()
_MLP, _HEADS = partition_spec(BATCH_AXES, None, TENSOR_AXIS), partition_spec(BATCH_AXES, None, TENSOR_AXIS, None)


def product(x: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """`x [..., D]` times a matrix in the same dtype, `[..., F]`. A kernel for `[B, T, D]` and a whole matrix."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.shape[FSDP_AXIS] == mesh.shape[TENSOR_AXIS] == 1
    if whole and _has_kernel(x, 3) and not any(size % _BLOCK for size in matrix_DF.shape):
        return over_mesh(_multiplied, (_ROWS, _WHOLE), _ROWS)(x, matrix_DF)
    return _plain_product(x, matrix_DF)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, elementwise (Shazeer 2020, eq. 6). A kernel for `[B, T, F]`."""
    if _has_kernel(gate, 3):
        return over_mesh(_gated, (_MLP, _MLP), _MLP)(gate, up)
    return jax.nn.silu(gate) * up


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """RoPE, as `rope.apply_rope`. A kernel for `[B, T, N, H]`."""
    if _has_kernel(x, 4):
        return over_mesh(_rotated, (_HEADS, _ROWS, _ROWS), _HEADS)(x, *angles)
    return apply_rope(x, angles)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """`x`, and its RMSNorm `x / sqrt(mean(x^2) + eps) * scale` (Zhang and Sennrich 2019, eq. 4), float32 inside.

    Whoever goes on with both lets the backward pass add up their gradients at once. A kernel for `[B, T, D]`.
    """
    if _has_kernel(x, 3):
        return over_mesh(functools.partial(_normed, eps), (_ROWS, _WHOLE), (_ROWS, _ROWS))(x, scale_D)
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    scale = jnp.broadcast_to(scale_D, x.shape)
    return x, (x_f32 * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


def _has_kernel(x: jax.Array, rank: int) -> bool:
    return ambient_platform() == "cpu" and x.ndim == rank and x.dtype == jnp.float32 and native.is_available()


def _plain_product(x: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    # As one two-dimensional product: the gradient of a product over several leading axes makes XLA's CPU backend fuse a
    # transposing copy with what produced the cotangent, which cost a fifth of a training step.
    out_MF = jnp.einsum("MD,DF->MF", x.reshape(-1, x.shape[-1]), matrix_DF)
    return out_MF.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _multiplied(x_BTD: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    return _plain_product(x_BTD, matrix_DF)


def _multiplied_forward(x_BTD: jax.Array, matrix_DF: jax.Array) -> tuple[jax.Array, Any]:
    return _plain_product(x_BTD, matrix_DF), (x_BTD, matrix_DF)


def _multiplied_backward(saved: Any, dout_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, matrix_DF = saved
    x_MD, dout_MF = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, dout_BTF))
    return _plain_product(dout_BTF, matrix_DF.T), native.outer(x_MD, dout_MF)


_multiplied.defvjp(_multiplied_forward, _multiplied_backward)


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return native.swiglu(gate, up)


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    return native.swiglu(gate, up), (gate, up)


def _gated_backward(saved: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    return native.swiglu_backward(gate, up, dout)


_gated.defvjp(_gated_forward, _gated_backward)


@jax.custom_vjp
def _rotated(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    flat = native.rotate(x_BTNH.reshape(*x_BTNH.shape[:2], -1), (cos, sin))
    return flat.reshape(x_BTNH.shape)


def _rotated_forward(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Any]:
    return _rotated(x_BTNH, cos, sin), (cos, sin)


def _rotated_backward(saved: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = saved
    return _rotated(dout_BTNH, cos, -sin), None, None  # angles come from positions: they have no gradient


_rotated.defvjp(_rotated_forward, _rotated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed(eps: float, x: jax.Array, scale_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, native.rms_norm(x, scale_D, eps)


def _normed_forward(eps: float, x: jax.Array, scale_D: jax.Array) -> tuple[Any, Any]:
    return _normed(eps, x, scale_D), (x, scale_D)


def _normed_backward(eps: float, saved: Any, douts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    x, scale_D = saved
    given, dout = douts
    return native.rms_norm_backward(x, scale_D, dout, given, eps)


_normed.defvjp(_normed_forward, _normed_backward)
