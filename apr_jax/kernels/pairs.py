"""Pages as the paged attention kernels of TPUs and GPUs want them.

Both want pages heads first, `[heads, pages, ...]`. A pair (page, group) is as contiguous in `[P, J, C, W]`, so they are
given `P * J` pages of a single head, lanes times groups as their batch, and tables of pairs: a reshape, no copy.
Letters as in `model/paged_attention.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from apr_jax.model.online_softmax import Block
from apr_jax.model.paged_attention import PagedAttention, Places

# (queries [L, J, M, W], pages of keys and of values [P, J, C, W], lengths [L], tables [L, R]) -> outputs [L, J, M, W]
PagesKernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPagedAttention(PagedAttention):
    """A `PagedAttention` by a kernel that attends to pages, which XLA writes before."""

    kernel: PagesKernel

    def attend(self, q_LNH: jax.Array, pages: Block, places: Places) -> jax.Array:
        scaled_LNH = (q_LNH / math.sqrt(q_LNH.shape[-1])).astype(q_LNH.dtype)
        q_LJMW = self.tile.pack_queries(scaled_LNH, pages[0].shape[1])
        return self.tile.unpack_outputs(self.kernel(q_LJMW, *pages, places.seen_L, places.tables_LR))
