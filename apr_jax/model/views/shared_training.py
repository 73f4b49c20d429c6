"""The view of training on sequences whose workers shared their caches: the same function as `shared.py`'s.

A sequence is the common prompt and then every worker's segment, one after the other, and what the workers saw of each
other stands in arrays beside the tokens (`SharedRows`). The view, and why queries are rotated, is told in
`shared.py`. Among the others of a worker, the r-th in order (r = 1, 2, ..) is seen with the query rotated further
by the tokens seen of the r-th and of those after it; the prompt with it rotated by those of all, as the first other is.
So W workers need W rotations of a query: one as it comes, for its own segment, and W - 1 more.

Plain XLA in blocks of queries against whole rows, each recomputed in the backward pass. Besides the letters
of `model/__init__.py`: W workers.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.model.attention import attend_visible
from apr_jax.model.ops import Angles, apply_rope
from apr_jax.model.rope import Frequencies, rope_angles_once

_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedRows:
    """The tokens of packed rows: who wrote them, and what they saw. Padding is 0 everywhere."""

    segment_ids: jax.Array  # int32 [B, T], the sequences of a row: 1, 2, ..
    workers: jax.Array  # int32 [B, T]: 0 = the prompt, 1 + w = worker w
    places: jax.Array  # int32 [B, T]: the token's place in its worker's segment, from 0
    seen: jax.Array  # int32 [B, T, W]: tokens of each worker's segment that a token sees; its own's is not read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedTrainingRows:
    """A `View` of packed rows whose sequences hold several workers."""

    rope: Angles
    rows: SharedRows
    further: tuple[Angles, ...]  # of `shared_angles`

    def angles(self) -> Angles:
        return self.rope

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        """See `View`. The leading axes are B and T."""
        return shared_attention(q_TNH, k_TKH, v_TKH, self.rows, self.further), self


def shared_training_rows(config: ModelConfig, positions_BT: jax.Array, rows: SharedRows) -> SharedTrainingRows:
    """Return the view of tokens whose positions count in each worker's own row (`shared.py`)."""
    frequencies = Frequencies.of(config)
    return SharedTrainingRows(rope_angles_once(positions_BT, frequencies), rows, shared_angles(rows, frequencies))


def shared_angles(rows: SharedRows, frequencies: Frequencies) -> tuple[Angles, ...]:
    """Compute the queries' further rotations: for the first of the others and the prompt, the second, and so on."""
    own_BT1 = rows.workers[..., None]
    rank_R = 1 + jnp.arange(rows.seen.shape[-1] - 1)[None, None]
    # The r-th other is worker r where that is before the query's own, else worker r + 1, both counted from 1.
    seen_BTR = jnp.where(rank_R < own_BT1, rows.seen[..., :-1], rows.seen[..., 1:])
    shift_BTR = jnp.cumsum(seen_BTR[..., ::-1], axis=-1)[..., ::-1]
    return tuple(rope_angles_once(shift_BTR[..., rank], frequencies) for rank in range(shift_BTR.shape[-1]))


def shared_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: SharedRows, angles: Sequence[Angles]
) -> jax.Array:
    """Attend from each token to what its worker's view held; scores are scaled by 1/sqrt(H).

    Args:
        q_BTNH, k_BTKH, v_BTKH: rotated to the tokens' positions in their own worker's row (`shared.py`).
        rows: of the tokens.
        angles: of `shared_angles`.

    Returns:
        `[B, T, N, H]` in the dtype of the queries. Scores and softmax are float32.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    scaled = (q_BTNH / math.sqrt(H)).astype(q_BTNH.dtype)
    turned_RBTNH = [scaled, *(apply_rope(scaled, further) for further in angles)]
    turned_RBKGTH = [jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3) for q in turned_RBTNH]
    k_BKSH, v_BKSH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    outs = []
    for start in range(0, T, _BLOCK):
        block = slice(start, min(start + _BLOCK, T))
        queries = [q[:, :, :, block] for q in turned_RBKGTH]
        of_queries = jax.tree.map(lambda x, block=block: x[:, block], rows)
        outs.append(jax.checkpoint(_attend_block)(queries, k_BKSH, v_BKSH, of_queries, rows, start))
    return jnp.moveaxis(jnp.concatenate(outs, axis=3), 3, 1).reshape(B, T, N, H)


def _attend_block(
    turned_RBKGTH: Sequence[jax.Array],
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    queries: SharedRows,
    keys: SharedRows,
    start: int,
) -> jax.Array:
    own_BTS = queries.workers[:, :, None] == keys.workers[:, None]
    first_BTS = keys.workers[:, None] < queries.workers[:, :, None]
    # Which of the others a key is of, counted from 1; the prompt is seen as the first of them is.
    rank_BTS = jnp.maximum(jnp.where(first_BTS, keys.workers[:, None], keys.workers[:, None] - 1), 1)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", turned_RBKGTH[0], k_BKSH, preferred_element_type=jnp.float32)
    for rank, q_BKGTH in enumerate(turned_RBKGTH[1:], start=1):
        turned = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
        scores = jnp.where((~own_BTS & (rank_BTS == rank))[:, None, None], turned, scores)
    return attend_visible(scores, _visible(queries, keys, start), v_BKSH).astype(turned_RBKGTH[0].dtype)


def _visible(queries: SharedRows, keys: SharedRows, start: int) -> jax.Array:
    """Return bool `[B, T, S]`: T queries from column `start` on, S keys from column 0 on."""
    T, S = queries.workers.shape[1], keys.workers.shape[1]
    causal_TS = jnp.arange(S)[None] <= start + jnp.arange(T)[:, None]
    key_workers_B1S = keys.workers[:, None]
    visible_BTS = causal_TS[None] & ((key_workers_B1S == queries.workers[:, :, None]) | (key_workers_B1S == 0))
    for worker in range(queries.seen.shape[-1]):
        theirs_B1S, other_BT1 = key_workers_B1S == 1 + worker, queries.workers[:, :, None] != 1 + worker
        visible_BTS |= theirs_B1S & other_BT1 & (keys.places[:, None] < queries.seen[:, :, worker, None])
    return visible_BTS & (keys.segment_ids[:, None] == queries.segment_ids[:, :, None])
