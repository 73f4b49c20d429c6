"""The views of training: packed rows, whose tokens see the earlier tokens of their own segment."""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.model.attention import named, xla_attention
from apr_jax.model.ops import Angles
from apr_jax.model.rope import Frequencies, rope_angles_once

# (queries, keys, values, segment ids, first later times that do not see each token) -> outputs
TrainingAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
# (queries, keys, values, lengths of segments) -> outputs
PackedAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """A `View` of rows of segments: each is one sequence, or several that begin alike and hold what is common once.

    In the second case tokens say how far they reach (`data/prefixes.py`): what comes after the end of a branch does not
    see that branch.
    """

    rope: Angles
    segment_ids: jax.Array  # int32 [..., T]: tokens with one id lie side by side and see each other
    ends: jax.Array | None  # int32 [..., T]: the first later time that does not see a token; None: none before its end
    attention: TrainingAttention = dataclasses.field(metadata={"static": True})

    def angles(self) -> Angles:
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(-1, *x.shape[-3:]) for x in (q_TNH, k_TKH, v_TKH))
        ids_BT = self.segment_ids.reshape(-1, self.segment_ids.shape[-1])
        ends_BT = None if self.ends is None else self.ends.reshape(ids_BT.shape)
        out_BTNH = self.attention(q_BTNH, k_BTKH, v_BTKH, ids_BT, ends_BT)
        return named(out_BTNH).reshape(q_TNH.shape), self


def training_rows(
    config: ModelConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    reach: jax.Array | None = None,
    attention: TrainingAttention = xla_attention,
) -> TrainingRows:
    """Return the view of tokens `[..., T]`.

    Args:
        positions: int32 `[..., T]`, the tokens' positions in their own sequence (they restart at each segment).
        segment_ids: int32 `[..., T]`; None: each row is one segment.
        reach: int32 `[..., T]`, how many tokens of its segment see this one, from itself on; None: all later ones.

    Raises:
        ValueError: shapes differ.
    """
    for name, array in (("segment_ids", segment_ids), ("reach", reach)):
        if array is not None and array.shape != positions.shape:
            raise ValueError(f"{name} {array.shape} and positions {positions.shape} must have one shape")
    T = positions.shape[-1]
    times = jnp.arange(T, dtype=jnp.int32).reshape((1,) * (positions.ndim - 1) + (T,))
    return TrainingRows(
        rope_angles_once(positions, Frequencies.of(config)),
        jnp.ones(positions.shape, jnp.int32) if segment_ids is None else segment_ids,
        None if reach is None else times + reach,
        attention,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A `View` of rows of segments that are told by their lengths (`data/segments.py`), each of them one sequence."""

    rope: Angles
    lengths: jax.Array  # int32 [B, M]
    attention: PackedAttention = dataclasses.field(metadata={"static": True})

    def angles(self) -> Angles:
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """See `View`. The leading axes are B and T."""
        return named(self.attention(q_TNH, k_TKH, v_TKH, self.lengths)), self


def packed_rows(
    config: ModelConfig, positions_BT: jax.Array, lengths_BM: jax.Array, attention: PackedAttention
) -> PackedRows:
    """Return the view of rows by the lengths of their segments."""
    return PackedRows(rope_angles_once(positions_BT, Frequencies.of(config)), lengths_BM, attention)
