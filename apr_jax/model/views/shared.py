"""The view of a decode step of workers that share their caches (Hogwild!, arXiv 2504.06261, section 3).

A group of W workers decodes in lockstep. Each worker is a thread with a row of its own: the common prompt, then its
segment. What worker w sees in a step is

    [common prompt] [the other workers' segments, in the order of workers] [its own segment]

with positions that count up from 0 through all of it, and of every segment the tokens that have been computed, those
of the step itself included. As segments grow, a key's position in such a view changes with every step and differs from
worker to worker. So keys are stored once, rotated to their position in their own row, and the query is rotated instead:
attention depends on the difference of the two positions alone. With n_u tokens visible in the segment of worker u, all
of the others' together n, and those of the others before u in order b_u, a query of position p in its own row is
rotated to

    p            for the keys of its own segment, as it comes,
    p + n        for the keys of the prompt,
    p + n - b_u  for the keys of worker u's segment,

which is its distance to them in the view. Besides the letters of `model/__init__.py`: A groups, W and U workers of
a group (as queries and as keys); lane `a * W + w` is worker w of group a.
"""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.model.online_softmax import Block, Part, empty_part, merge, normalise, softmax_part
from apr_jax.model.ops import Angles, apply_rope
from apr_jax.model.rope import Frequencies, rope_angles

Spans = tuple[jax.Array, jax.Array]  # keys and values [spans, L, K, S, H]: the lanes' rows, span by span


def segment_shifts(written_AU: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute how much further than to its own position a query is rotated.

    Args:
        written_AU: visible tokens of each segment.

    Returns:
        int32 `[A, W]` for the prompt's keys, and `[A, W, U]` for those of each worker's segment.
    """
    own_1WU = jnp.eye(written_AU.shape[1], dtype=bool)[None]
    others_AWU = jnp.where(own_1WU, 0, written_AU[:, None])
    all_AW = jnp.sum(others_AWU, axis=-1)
    before_AWU = jnp.cumsum(others_AWU, axis=-1) - others_AWU
    return all_AW, jnp.where(own_1WU, 0, all_AW[..., None] - before_AWU)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedWorkers:
    """A `View` of the caches of all groups of a shard in one step. New keys and values stand at the chunk's step."""

    rope: Angles  # of each lane's position in its own row
    rows: tuple[Spans, ...]  # per layer, the lanes' rows as they were before the chunk
    num_spans: jax.Array  # int32 scalar, spans that any lane fills
    fresh: tuple[Block, ...]  # per layer, keys and values [L, K, C, H]; C = steps of a chunk
    seen_L: jax.Array  # int32, of them, positions that are visible in this step
    lengths_L: jax.Array  # int32, positions in each row before the chunk
    prompts_L: jax.Array  # int32, of them, those of the common prompt
    step: jax.Array  # int32 scalar, steps of the chunk before this one
    workers: int = dataclasses.field(metadata={"static": True})  # W
    frequencies: Frequencies = dataclasses.field(metadata={"static": True})

    def angles(self) -> Angles:
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """See `View`. The leading axis is L."""
        out_LNH, block = _attend_all((q_TNH, k_TKH, v_TKH), self, layer)
        fresh = (*self.fresh[:layer], block, *self.fresh[layer + 1 :])
        return out_LNH, dataclasses.replace(self, fresh=fresh)


def _attend_all(threads: tuple[jax.Array, ...], view: SharedWorkers, layer: int) -> tuple[jax.Array, Block]:
    """Write every lane's new key and value, and attend to what its group shares. Return `[L, N, H]` and both."""
    (q_LNH, k_LKH, v_LKH), W = threads, view.workers
    k_LKCH, v_LKCH = (
        jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], view.step, axis=2)
        for old, new in zip(view.fresh[layer], (k_LKH, v_LKH), strict=True)
    )
    (L, K, C, H), N = k_LKCH.shape, q_LNH.shape[1]
    A, G = L // W, N // K

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(A, W, *x.shape[1:])

    lengths_AU, prompts_AU, seen_AU = (grouped(x) for x in (view.lengths_L, view.prompts_L, view.seen_L))
    to_prompt_AW, to_segment_AWU = segment_shifts(lengths_AU - prompts_AU + seen_AU)
    q_AWNH = grouped((q_LNH / math.sqrt(H)).astype(q_LNH.dtype))
    prompt_AWKGH = _turned(q_AWNH, to_prompt_AW, view.frequencies).reshape(A, W, K, G, H)
    segment_AWUNH = _turned(jnp.broadcast_to(q_AWNH[:, :, None], (A, W, W, N, H)), to_segment_AWU, view.frequencies)
    # All that look at worker u's keys look at once: their heads lie side by side.
    segment_AUKMH = segment_AWUNH.reshape(A, W, W, K, G, H).transpose(0, 2, 3, 1, 4, 5).reshape(A, W, K, W * G, H)
    k_rows, v_rows = view.rows[layer]
    S = k_rows.shape[3]

    def further(span: jax.Array, parts: tuple[Part, Part]) -> tuple[Part, Part]:
        places_11S = span * S + jnp.arange(S)[None, None]
        block = tuple(grouped(jax.lax.dynamic_index_in_dim(x, span, keepdims=False)) for x in (k_rows, v_rows))
        in_prompt = (places_11S < prompts_AU[..., None])[:, :, None, None]
        in_segment = (places_11S < lengths_AU[..., None])[:, :, None, None] & ~in_prompt
        return (
            merge(parts[0], softmax_part(prompt_AWKGH, (block[0], block[1]), in_prompt)),
            merge(parts[1], softmax_part(segment_AUKMH, (block[0], block[1]), in_segment)),
        )

    nothing = empty_part((A, W, K, G), H), empty_part((A, W, K, W * G), H)
    of_prompt, of_segments = jax.lax.fori_loop(0, view.num_spans, further, nothing)
    visible = (jnp.arange(C)[None, None] < seen_AU[..., None])[:, :, None, None]
    of_fresh = softmax_part(segment_AUKMH, (grouped(k_LKCH), grouped(v_LKCH)), visible)
    of_segments = merge(of_segments, of_fresh)
    merged = of_prompt
    for worker in range(W):  # in a fixed order, so that a result is the same in every batch
        part = jax.tree.map(
            lambda x, worker=worker: jnp.swapaxes(x[:, worker].reshape(A, K, W, G, *x.shape[4:]), 1, 2), of_segments
        )
        merged = merge(merged, part)
    # A lane without a worker sees nothing; it must stay finite, for its masked values are multiplied by 0.
    return normalise(merged).reshape(L, N, H).astype(q_LNH.dtype), (k_LKCH, v_LKCH)


def _turned(x: jax.Array, shift: jax.Array, frequencies: Frequencies) -> jax.Array:
    """Rotate queries `[..., N, H]` further by `shift [...]` positions."""
    return apply_rope(x, rope_angles(shift, frequencies))
