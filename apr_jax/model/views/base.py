"""The interface of views: what a model asks of the place where its tokens stand."""

from typing import Protocol, Self, TypeVar

import jax

from apr_jax.model.ops import Angles


class View(Protocol):
    """The tokens that the tokens at hand can see: an immutable pytree.

    Leading axes of all arrays are those of the tokens, such as `[B, T]` for rows of a batch and `[L]` for lanes that
    decode a token each.
    """

    def angles(self) -> Angles:
        """Return RoPE's cosines and sines of the tokens' positions, `[..., 1, H/2]`."""

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """Attend from each token to what it sees, itself included.

        Args:
            layer: the layer's number, from 0.
            q_TNH, k_TKH, v_TKH: queries `[..., N, H]`, keys and values `[..., K, H]`, RoPE applied. Query head n reads
                key/value head n // G; scores are scaled by 1/sqrt(H).

        Returns:
            `[..., N, H]` in the dtype of the queries, and the view that the next layer sees.
        """


V = TypeVar("V", bound=View)
