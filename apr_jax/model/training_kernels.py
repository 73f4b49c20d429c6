"""Products with a matrix and SwiGLU's gate as training takes them: from `native.py` in float32 on a CPU, else from XLA.

XLA's CPU backend multiplies at the machine's limit but for a matrix's gradient, and takes thrice as long for the gate.
Letters of shapes are in `llama.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.model import native
from apr_jax.parallel.mesh import BATCH_AXES, TENSOR_AXIS, num_row_shards, partition_spec

_BLOCK = 16  # of the kernels


def product(x_BTD: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """`x [..., D]` times a matrix in the same dtype, `[..., F]`.

    The kernel is for a batch `[B, T, D]` whose rows are split over the ambient mesh, and nothing else.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _is_training(x_BTD) and not any(size % _BLOCK for size in matrix_DF.shape):
        if mesh.empty or mesh.size == 1:
            return _multiplied(x_BTD, matrix_DF)
        if mesh.size == num_row_shards() and mesh.shape["fsdp"] == 1:
            rows, whole = partition_spec(BATCH_AXES), partition_spec()
            mapped = jax.shard_map(_multiplied, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False)
            return mapped(x_BTD, matrix_DF)
    return _plain(x_BTD, matrix_DF)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, elementwise (Shazeer 2020, eq. 6). The kernel is for a batch `[B, T, F]`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_training(gate):
        return jax.nn.silu(gate) * up
    if mesh.empty or mesh.size == 1:
        return _gated(gate, up)
    spec = partition_spec(BATCH_AXES, None, TENSOR_AXIS)
    return jax.shard_map(_gated, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)(gate, up)


def _is_training(x: jax.Array) -> bool:
    return jax.default_backend() == "cpu" and x.ndim == 3 and x.dtype == jnp.float32 and native.is_available()


def _plain(x: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    # As one two-dimensional product: the gradient of a product over several leading axes makes XLA's CPU backend fuse a
    # transposing copy with what produced the cotangent, which cost a fifth of a training step.
    out_MF = jnp.einsum("MD,DF->MF", x.reshape(-1, x.shape[-1]), matrix_DF)
    return out_MF.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _multiplied(x_BTD: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    return _plain(x_BTD, matrix_DF)


def _multiplied_forward(x_BTD: jax.Array, matrix_DF: jax.Array) -> tuple[jax.Array, Any]:
    return _plain(x_BTD, matrix_DF), (x_BTD, matrix_DF)


def _multiplied_backward(saved: Any, dout_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, matrix_DF = saved
    x_MD, dout_MF = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, dout_BTF))
    return _plain(dout_BTF, matrix_DF.T), native.outer(x_MD, dout_MF)


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return native.swiglu(gate, up)


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    return native.swiglu(gate, up), (gate, up)


def _gated_backward(saved: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    return native.swiglu_backward(gate, up, dout)


_multiplied.defvjp(_multiplied_forward, _multiplied_backward)
_gated.defvjp(_gated_forward, _gated_backward)
