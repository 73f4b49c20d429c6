"""Rotary position embedding (Su et al. 2021). Letters of shapes as in `llama.py`.

Rotations add up: a query that was rotated to position p and is rotated by d more stands at p + d.
"""

import math

import jax
import jax.numpy as jnp

_ANGLE_CHUNKS = 4

Angles = tuple[jax.Array, jax.Array]  # cosines and sines


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> Angles:
    """Cosines and sines of RoPE (Su et al. 2021, eq. 15): `positions [..., T]` to `[..., T, 1, H/2]`."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequencies = frequencies.reshape((1,) * (positions.ndim + 1) + (-1,))
    angles = jnp.expand_dims(positions.astype(jnp.float32), (-2, -1)) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope_angles_once(positions: jax.Array, head_dim: int, theta: float) -> Angles:
    """The same, computed in a loop over stretches of time, which XLA does not fuse with what reads the result.

    Else its CPU backend computes them anew for every head of every layer, forward and backward: a tenth of a step.
    """
    chunks = math.gcd(positions.shape[-1], _ANGLE_CHUNKS)
    if chunks == 1:
        return rope_angles(positions, head_dim, theta)
    positions_C = jnp.moveaxis(positions.reshape(*positions.shape[:-1], chunks, -1), -2, 0)
    angles_C = jax.lax.map(lambda positions: rope_angles(positions, head_dim, theta), positions_C)
    time = positions.ndim - 1
    return jax.tree.map(lambda x_C: jnp.moveaxis(x_C, 0, time).reshape(*positions.shape, 1, head_dim // 2), angles_C)


def apply_rope(x_TNH: jax.Array, angles: Angles) -> jax.Array:
    """Rotates pairs (i, i + H/2) by the angles: the Hugging Face order of pairs, so its weights load unchanged."""
    cos, sin = angles
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_TNH.dtype)
