"""Key/value heads side by side in a page, for kernels whose rows are wider than a head."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class HeadTile:
    """A layout of key/value heads in a page: `heads` neighbours side by side, then `padding` zeros.

    Letters: J head groups of a page, W elements of a group in one position.
    """

    heads: int = 1
    padding: int = 0

    def head_dim(self, width: int) -> int:
        """Return H for groups of `width` elements."""
        return (width - self.padding) // self.heads

    def page_dtype(self, compute_dtype: str) -> str:
        """Return the dtype of pages."""
        return compute_dtype

    def rounded(self, x: jax.Array) -> jax.Array:
        """Return heads `[..., K, C, H]` as they come back from pages."""
        return x

    def pack(self, x: jax.Array) -> jax.Array:
        """Lay heads `[..., K, C, H]` out as groups `[..., J, C, W]`."""
        *lead, K, C, H = x.shape
        grouped = jnp.swapaxes(x.reshape(*lead, K // self.heads, self.heads, C, H), -3, -2)
        return _pad_last(grouped.reshape(*lead, K // self.heads, C, self.heads * H), self.padding)

    def unpack(self, x: jax.Array) -> jax.Array:
        """Take groups `[..., J, C, W]` apart into heads `[..., K, C, H]`."""
        *lead, J, C, W = x.shape
        H = self.head_dim(W)
        grouped = x[..., : self.heads * H].reshape(*lead, J, C, self.heads, H)
        return jnp.swapaxes(grouped, -3, -2).reshape(*lead, J * self.heads, C, H)


PLAIN = HeadTile()


def _pad_last(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)]) if count else x
