"""The view of a decode step: lanes of one token each, which are written to their threads' pages and attend there."""

import dataclasses
from typing import Self

import jax

from apr_jax.config import ModelConfig
from apr_jax.model.ops import Angles
from apr_jax.model.paged_attention import PagedAttention, Places
from apr_jax.model.paged_cache import PagedKVCache
from apr_jax.model.rope import Frequencies, rope_angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLanes:
    """A `View` of lanes: the pages of a shard, and where each lane's token stands in its thread's row."""

    rope: Angles
    pages: PagedKVCache
    places: Places
    attention: PagedAttention = dataclasses.field(metadata={"static": True})

    def angles(self) -> Angles:
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """See `View`. The leading axis is L."""
        out_LNH, pages = self.attention(q_TNH, k_TKH, v_TKH, self.pages.layer(layer), self.places)
        return out_LNH, dataclasses.replace(self, pages=self.pages.replace_layer(layer, pages))


def paged_lanes(config: ModelConfig, pages: PagedKVCache, places: Places, attention: PagedAttention) -> PagedLanes:
    """Return the view of lanes at these places."""
    return PagedLanes(rope_angles(places.positions_L, Frequencies.of(config)), pages, places, attention)
