"""The view of a prefill call: chunks of new positions, after what their threads' rows hold already."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.online_softmax import Block, merge, normalise, softmax_part
from apr_jax.model.ops import Angles
from apr_jax.model.paged_attention import attend_rows
from apr_jax.model.paged_cache import PagedKVCache
from apr_jax.model.rope import Frequencies, rope_angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillRows:
    """A `View` of C new positions of each of L threads. Pages are only read; `fresh` collects new keys and values."""

    rope: Angles
    pages: PagedKVCache
    lengths_L: jax.Array  # int32, positions that the pages hold of each row
    tables_LR: jax.Array  # int32, the pages of each row in order
    fresh: tuple[Block, ...]  # per layer so far, keys and values [L, K, C, H]
    tile: HeadTile = dataclasses.field(metadata={"static": True})

    def angles(self) -> Angles:
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """See `View`. The leading axes are L and C."""
        (L, C, N, H), K = q_TNH.shape, k_TKH.shape[2]
        G = N // K
        k_LKCH, v_LKCH = (jnp.swapaxes(x, 1, 2) for x in (k_TKH, v_TKH))
        q_LKGCH = (q_TNH / math.sqrt(H)).astype(q_TNH.dtype).reshape(L, C, K, G, H).transpose(0, 2, 3, 1, 4)
        q_LKMH = q_LKGCH.reshape(L, K, G * C, H)
        row = attend_rows(q_LKMH, self.pages.layer(layer), self.lengths_L, self.tables_LR, self.tile)
        causal_GCC = jnp.broadcast_to(jnp.tri(C, dtype=bool)[None], (G, C, C))
        seen = self.tile.rounded(k_LKCH), self.tile.rounded(v_LKCH)
        chunk = softmax_part(q_LKMH, seen, causal_GCC.reshape(1, 1, G * C, C))
        out_LKGCH = normalise(merge(row, chunk)).reshape(L, K, G, C, H)
        out_LCNH = out_LKGCH.transpose(0, 3, 1, 2, 4).reshape(q_TNH.shape).astype(q_TNH.dtype)
        return out_LCNH, dataclasses.replace(self, fresh=(*self.fresh, (k_LKCH, v_LKCH)))


def prefill_rows(
    config: ModelConfig, pages: PagedKVCache, starts_L: jax.Array, tables_LR: jax.Array, width: int, tile: HeadTile
) -> PrefillRows:
    """Return the view of chunks of `width` positions from `starts_L` on."""
    positions_LC = starts_L[:, None] + jnp.arange(width)[None]
    angles = rope_angles(positions_LC, Frequencies.of(config))
    return PrefillRows(angles, pages, starts_L, tables_LR, (), tile)
