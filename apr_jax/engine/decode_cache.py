"""The cache of a decode chunk, as the loop over its steps sees it."""

import dataclasses
from typing import Any, Protocol

import jax

from apr_jax.config import ModelConfig
from apr_jax.model.paged_attention import PagedAttention, Places
from apr_jax.model.paged_cache import PagedKVCache
from apr_jax.model.views.decode import PagedLanes, paged_lanes


class DecodeCache(Protocol):
    """The cache of one chunk on one shard. The loop carries `start()`, then `carried` of each step's last view."""

    def start(self) -> Any:
        """Return what the first step is given."""

    def view(self, carried: Any, step: jax.Array, live_L: jax.Array) -> Any:
        """Return what the lanes' threads see in a step (a `View`); `live_L` says which of them write."""

    def carried(self, view: Any) -> Any:
        """Return what a step hands to the next one."""

    def finish(self, carried: Any, counts_L: jax.Array) -> PagedKVCache:
        """Return the pages, with the first `counts_L` new positions of each lane in them."""


@dataclasses.dataclass(frozen=True)
class PagesInPlace:
    """A `DecodeCache` whose steps write to the pages and attend to them where they lie."""

    config: ModelConfig
    attention: PagedAttention
    pages: PagedKVCache
    tables_LR: jax.Array
    lengths_L: jax.Array  # int32, positions in each row before the chunk

    def start(self) -> PagedKVCache:
        return self.pages

    def view(self, carried: PagedKVCache, step: jax.Array, live_L: jax.Array) -> PagedLanes:
        places = Places(self.lengths_L + step, live_L, self.tables_LR)
        return paged_lanes(self.config, carried, places, self.attention)

    def carried(self, view: PagedLanes) -> PagedKVCache:
        return view.pages

    def finish(self, carried: PagedKVCache, counts_L: jax.Array) -> PagedKVCache:
        return carried
