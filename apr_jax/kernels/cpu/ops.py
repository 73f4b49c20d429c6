"""`Ops` of CPUs: for training in float32, and for decoding in float32 and bfloat16.

XLA's CPU backend multiplies at the machine's limit but for a matrix's gradient, and goes through memory once more for
each of the parts between two products. Training activations have their rows split over the ambient mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.kernels.cpu import bindings
from apr_jax.model import ops
from apr_jax.model.ops import Angles, Ops
from apr_jax.parallel.mesh import BATCH_AXES, FSDP_AXIS, TENSOR_AXIS, over_mesh, partition_spec, split_rows

_BLOCK = 16  # the kernels' unit along either axis of a matrix
_ROWS, _WHOLE = partition_spec(BATCH_AXES), partition_spec()
_MLP, _HEADS = partition_spec(BATCH_AXES, None, TENSOR_AXIS), partition_spec(BATCH_AXES, None, TENSOR_AXIS, None)


def matmul(x_BTD: jax.Array, matrices_DF: Sequence[jax.Array], widths: Sequence[int]) -> list[jax.Array]:
    """Multiply as `ops.matmul`, with a kernel for the gradient of each matrix."""
    return [product(x_BTD, matrix_DF) for matrix_DF in matrices_DF]


def product(x_BTD: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """Multiply as `ops.product`. The kernel is for matrices that no axis splits, whose sizes are multiples of 16."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.shape[FSDP_AXIS] == mesh.shape[TENSOR_AXIS] == 1
    if whole and not any(size % _BLOCK for size in matrix_DF.shape):
        return over_mesh(_multiplied, (_ROWS, _WHOLE), _ROWS)(x_BTD, matrix_DF)
    return ops.product(x_BTD, matrix_DF)


def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """Compute `ops.swiglu`."""
    return over_mesh(_gated, (_MLP, _MLP), _MLP)(gate_BTF, up_BTF)


def rope(x_BTNH: jax.Array, angles: Angles) -> jax.Array:
    """Rotate as `ops.apply_rope`."""
    return over_mesh(_rotated, (_HEADS, _ROWS, _ROWS), _HEADS)(x_BTNH, *angles)


def norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Compute `ops.rms_norm`, whose backward pass adds up both gradients at once."""
    return over_mesh(_normed(eps), (_ROWS, _WHOLE), (_ROWS, _ROWS))(split_rows(x_BTD), scale_D)


TRAINING = Ops(matmul=matmul, logits=ops.logits, norm=norm, rope=rope, swiglu=swiglu, draw=ops.draw, hold=ops.hold)


def _logits(x: jax.Array, panels: jax.Array, vocab_size: int) -> jax.Array:
    return bindings.products(x, [panels], [vocab_size], jnp.float32)[0]


def _norm(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return x, bindings.rms_norm(x, scale_D, eps)


def _rope(x_LNH: jax.Array, angles: Angles) -> jax.Array:
    return bindings.rotate(x_LNH.reshape(*x_LNH.shape[:-2], -1), angles).reshape(x_LNH.shape)


def _decoding(paired: bool) -> Ops:
    return Ops(
        matmul=bindings.products,
        logits=_logits,
        norm=_norm,
        rope=_rope,
        swiglu=bindings.swiglu,
        draw=bindings.draw,
        hold=functools.partial(bindings.to_panels, paired=paired),
    )


DECODING = {"float32": _decoding(paired=False), "bfloat16": _decoding(paired=True)}


def _with_gradient(compute: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute`, whose gradient is `backward(*inputs, gradient of the output)`."""
    function = jax.custom_vjp(compute)
    function.defvjp(lambda *inputs: (compute(*inputs), inputs), lambda inputs, dout: backward(*inputs, dout))
    return function


def _multiplied_backward(x_BTD: jax.Array, matrix_DF: jax.Array, dout_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, dout_MF = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, dout_BTF))
    return ops.product(dout_BTF, matrix_DF.T), bindings.outer(x_MD, dout_MF)


def _rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    flat = bindings.rotate(x_BTNH.reshape(*x_BTNH.shape[:2], -1), (cos, sin))
    return flat.reshape(x_BTNH.shape)


def _rotate_back(
    x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, dout_BTNH: jax.Array
) -> tuple[jax.Array, None, None]:
    return _rotate(dout_BTNH, cos, -sin), None, None  # angles come from positions: they have no gradient


def _normed(eps: float) -> Callable[..., Any]:
    def backward(x: jax.Array, scale_D: jax.Array, douts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        given, dout = douts
        return bindings.rms_norm_backward(x, scale_D, dout, given, eps)

    return _with_gradient(lambda x, scale_D: (x, bindings.rms_norm(x, scale_D, eps)), backward)


_multiplied = _with_gradient(ops.product, _multiplied_backward)
_gated = _with_gradient(bindings.swiglu, bindings.swiglu_backward)
_rotated = _with_gradient(_rotate, _rotate_back)
