"""The view of a decode step: lanes of one token each, which are written to their threads' pages and attend there."""

import dataclasses
from typing import Self

import jax

from apr_jax.config import ModelConfig
from apr_jax.model.ops import Angles
from apr_jax.model.paged_attention import PagedAttention
from apr_jax.model.paged_cache import PagedKVCache
from apr_jax.model.rope import Frequencies, rope_angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLanes:
    """The pages of a shard, and where each lane's token stands in its thread's row."""

    rope: Angles
    pages: PagedKVCache
    positions_L: jax.Array  # int32
    live_L: jax.Array  # bool: a lane without a thread, or whose thread stopped, writes to the trash page
    tables_LR: jax.Array  # int32, the pages of each row in order
    attention: PagedAttention = dataclasses.field(metadata={"static": True})

    def angles(self) -> Angles:
        """See `View`."""
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """See `View`. The leading axis is L."""
        old, places = self.pages, (self.positions_L, self.live_L, self.tables_LR)
        out_LNH, keys, values = self.attention(q_TNH, k_TKH, v_TKH, old.keys[layer], old.values[layer], *places)
        return out_LNH, dataclasses.replace(self, pages=old.replace_layer(layer, keys, values))


def paged_lanes(
    config: ModelConfig,
    pages: PagedKVCache,
    positions_L: jax.Array,
    live_L: jax.Array,
    tables_LR: jax.Array,
    attention: PagedAttention,
) -> PagedLanes:
    """Return the view of lanes at these positions."""
    angles = rope_angles(positions_L, Frequencies.of(config))
    return PagedLanes(angles, pages, positions_L, live_L, tables_LR, attention)
