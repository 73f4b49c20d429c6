"""The angles of rotary position embedding (Su et al. 2021)."""

import math

import jax
import jax.numpy as jnp

from apr_jax.model.ops import Angles

_CHUNKS = 4


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> Angles:
    """Compute RoPE's cosines and sines `[..., 1, H/2]` of `positions [...]` (Su et al. 2021, eq. 15)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequencies = frequencies.reshape((1,) * (positions.ndim + 1) + (-1,))
    angles = jnp.expand_dims(positions.astype(jnp.float32), (-2, -1)) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope_angles_once(positions: jax.Array, head_dim: int, theta: float) -> Angles:
    """Compute the same for `positions [..., T]` in a loop over stretches of time.

    XLA does not fuse the loop with what reads its result. Otherwise its CPU backend computes the angles anew for every
    head of every layer, forward and backward: a tenth of a training step.
    """
    chunks = math.gcd(positions.shape[-1], _CHUNKS)
    if chunks == 1:
        return rope_angles(positions, head_dim, theta)
    positions_C = jnp.moveaxis(positions.reshape(*positions.shape[:-1], chunks, -1), -2, 0)
    angles_C = jax.lax.map(lambda positions: rope_angles(positions, head_dim, theta), positions_C)
    time = positions.ndim - 1
    return jax.tree.map(lambda x_C: jnp.moveaxis(x_C, 0, time).reshape(*positions.shape, 1, head_dim // 2), angles_C)
