"""Pages as the paged attention kernel of GPUs wants them.

It wants pages heads first, `[heads, pages, ...]`. A pair (page, head) is as contiguous in `[P, J, C, W]`, so it is
given `P * J` pages of a single head, lanes times heads as its batch, and tables of pairs: a reshape, no copy. Letters
as in `model/paged_attention.py`.
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
        (L, N, H), J = q_LNH.shape, pages[0].shape[1]
        scaled_LJMH = (q_LNH / math.sqrt(H)).astype(q_LNH.dtype).reshape(L, J, N // J, H)
        return self.kernel(scaled_LJMH, *pages, places.seen_L, places.tables_LR).reshape(q_LNH.shape)
