"""The angles of rotary position embedding (Su et al. 2021)."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig, RopeScaling
from apr_jax.model.ops import Angles

_CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """The frequencies at which the pairs of a head rotate."""

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Return a model's frequencies."""
        return cls(config.head_dim, config.rope_theta, config.rope_scaling)

    def radians(self) -> jax.Array:
        """Compute the radians that each pair turns in one position, float32 `[H/2]` (Su et al. 2021, eq. 15)."""
        plain = self.theta ** (-jnp.arange(0, self.head_dim, 2, dtype=jnp.float32) / self.head_dim)
        return plain if self.scaling is None else _stretched(plain, self.scaling)


def rope_angles(positions: jax.Array, frequencies: Frequencies) -> Angles:
    """Compute RoPE's cosines and sines `[..., 1, H/2]` of `positions [...]`."""
    radians = frequencies.radians().reshape((1,) * (positions.ndim + 1) + (-1,))
    angles = jnp.expand_dims(positions.astype(jnp.float32), (-2, -1)) * radians
    return jnp.cos(angles), jnp.sin(angles)


def rope_angles_once(positions: jax.Array, frequencies: Frequencies) -> Angles:
    """Compute the same for `positions [..., T]` in a loop over stretches of time.

    XLA does not fuse the loop with what reads its result. Otherwise its CPU backend computes the angles anew for every
    head of every layer, forward and backward: a tenth of a training step.
    """
    chunks = math.gcd(positions.shape[-1], _CHUNKS)
    if chunks == 1:
        return rope_angles(positions, frequencies)
    positions_C = jnp.moveaxis(positions.reshape(*positions.shape[:-1], chunks, -1), -2, 0)
    angles_C = jax.lax.map(lambda positions: rope_angles(positions, frequencies), positions_C)
    time, shape = positions.ndim - 1, (*positions.shape, 1, frequencies.head_dim // 2)
    return jax.tree.map(lambda x_C: jnp.moveaxis(x_C, 0, time).reshape(shape), angles_C)


def _stretched(radians: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Divide the frequencies of long wavelengths, as Llama 3.1's released code does (`config.RopeScaling`)."""
    turns = scaling.original_max_seq_len * radians / (2 * math.pi)  # of a pair, over the original context
    width = scaling.high_frequency_factor - scaling.low_frequency_factor
    share = jnp.clip((turns - scaling.low_frequency_factor) / width, 0.0, 1.0)
    return (1 - share) * radians / scaling.factor + share * radians
