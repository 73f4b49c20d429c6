"""Pages of 8-bit keys and values: a `HeadTile` that rounds what it packs.

A head of a position is H integers from -127 to 127 and their scale, the largest magnitude over 127, whose four bytes
stand behind them. So whatever moves pages or rows of them moves scales along. A scale for each position and head, and
not for a page: a new token is written without a look at the others of its page, whose values never change. It costs 4
bytes a head, 6 % where H is 64.
"""

import dataclasses

import jax
import jax.numpy as jnp

from apr_jax.model.head_tile import HeadTile

_LARGEST = 127.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedTile(HeadTile):
    """A layout of 8-bit heads, one a group. `dtype` is that of the heads it unpacks."""

    padding: int = 4  # a float32 scale
    dtype: str

    def page_dtype(self, compute_dtype: str) -> str:
        """See `HeadTile`."""
        return "int8"

    def rounded(self, x: jax.Array) -> jax.Array:
        """See `HeadTile`."""
        return self.unpack(self.pack(x))

    def pack(self, x: jax.Array) -> jax.Array:
        """Round heads `[..., K, C, H]` to rows `[..., K, C, H + 4]` of int8."""
        heads = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(heads), axis=-1) / _LARGEST
        codes = jnp.round(heads / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8)
        return jnp.concatenate([codes, jax.lax.bitcast_convert_type(scale, jnp.int8)], axis=-1)

    def unpack(self, x: jax.Array) -> jax.Array:
        """Return the heads `[..., K, C, H]` that rows stand for."""
        scale = jax.lax.bitcast_convert_type(x[..., -self.padding :], jnp.float32)
        return (x[..., : -self.padding].astype(jnp.float32) * scale[..., None]).astype(self.dtype)
