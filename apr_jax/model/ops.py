"""The maths of a decoder as plain functions, and `Ops`, the record of functions that a model computes with.

`XLA` runs everywhere and is the definition; `apr_jax.kernels` offers records that are faster on one kind of machine.
Norms, RoPE, softmax and logits are computed in float32, products in the dtype of their operands.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from apr_jax.model.sampling import log_probs, sample

Angles = tuple[jax.Array, jax.Array]  # cosines and sines [..., 1, H/2]


@dataclasses.dataclass(frozen=True)
class Ops:
    """The functions of a layer. Leading axes are free everywhere."""

    # x [..., D], matrices as `hold` gives them, and the width F of each -> a product [..., F] for each
    matmul: Callable[[jax.Array, Sequence[jax.Array], Sequence[int]], list[jax.Array]]
    # x [..., D], the head as `hold` gives it, V -> float32 logits [..., V]
    logits: Callable[[jax.Array, jax.Array, int], jax.Array]
    # x [..., D], float32 scale [D], eps -> x, and its norm in the dtype of x
    norm: Callable[[jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]
    # x [..., N, H], angles -> x, rotated
    rope: Callable[[jax.Array, Angles], jax.Array]
    # gate and up [..., F] -> [..., F]
    swiglu: Callable[[jax.Array, jax.Array], jax.Array]
    # float32 logits [L, V], temperature, banned tokens [V], uniforms [L] -> tokens and their log-probabilities [L]
    draw: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    # a matrix [D, F] in the compute dtype -> the array that `matmul` reads
    hold: Callable[[jax.Array], jax.Array]
    # layers that keep their input alone for the backward pass run as one loop, so that a compiler sees one of them
    loops: bool = False


def matmul(x: jax.Array, matrices_DF: Sequence[jax.Array], widths: Sequence[int]) -> list[jax.Array]:
    """Multiply `x [..., D]` by each matrix."""
    return [product(x, matrix_DF) for matrix_DF in matrices_DF]


def product(x: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """Multiply `x [..., D]` by a matrix of its own dtype."""
    # As one two-dimensional product: the gradient of a product over several leading axes makes XLA's CPU backend fuse a
    # transposing copy with what produced the cotangent (docs/performance.md).
    out_MF = jnp.einsum("MD,DF->MF", x.reshape(-1, x.shape[-1]), matrix_DF)
    return out_MF.reshape(*x.shape[:-1], -1)


def logits(x: jax.Array, head_DV: jax.Array, vocab_size: int) -> jax.Array:
    """Compute float32 logits `[..., V]` of the final hidden states `x [..., D]`."""
    out_MV = jnp.einsum("MD,DV->MV", x.reshape(-1, x.shape[-1]), head_DV, preferred_element_type=jnp.float32)
    return out_MV.reshape(*x.shape[:-1], vocab_size)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Return `x` and its RMSNorm `x / sqrt(mean(x^2) + eps) * scale` (Zhang and Sennrich 2019, eq. 4).

    A residual stream goes on with `x` itself, and a kernel that returns both adds up both gradients at once.
    """
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    scale = jnp.broadcast_to(scale_D, x.shape)
    return x, (x_f32 * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


def apply_rope(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotate the pairs (i, i + H/2) of `x [..., N, H]` by the angles (Su et al. 2021, eq. 34).

    This is the order of pairs of Hugging Face, so its weights load unchanged. Rotations add up: a query that was
    rotated to position p, and then by d more, stands at p + d.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Compute `silu(gate) * up`, elementwise (Shazeer 2020, eq. 6)."""
    return jax.nn.silu(gate) * up


def draw(
    logits_LV: jax.Array, temperature: jax.Array, banned_mask_V: jax.Array, uniform_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw a token of each lane from the sampling policy, and tell its log-probability (`sampling.py`)."""
    return draw_from(log_probs(logits_LV, temperature, banned_mask_V), temperature, uniform_L)


def draw_from(logprobs_LV: jax.Array, temperature: jax.Array, uniform_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw a token of each lane from a policy's log-probabilities, and tell the token's own."""
    token_L = jax.vmap(sample, in_axes=(0, 0, None))(logprobs_LV, uniform_L, temperature)
    return token_L, jnp.take_along_axis(logprobs_LV, token_L[:, None], axis=1)[:, 0]


def hold(matrix_DF: jax.Array) -> jax.Array:
    """Return the matrix as it is."""
    return matrix_DF


XLA = Ops(matmul=matmul, logits=logits, norm=rms_norm, rope=apply_rope, swiglu=swiglu, draw=draw, hold=hold)
