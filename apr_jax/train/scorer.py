"""Scores of target tokens by the policy: the forward pass that both trainers share, and batches on the mesh.

Shapes: B rows, T time, D embed, V vocab, C chunks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ModelConfig
from apr_jax.data.segments import with_lengths
from apr_jax.kernels import GPUS, TrainingKernels, for_training, products
from apr_jax.model.params import Params, graphdef
from apr_jax.model.views.shared_training import SharedRows, shared_training_rows
from apr_jax.model.views.training import packed_rows, training_rows
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import BATCH_AXES, num_row_shards, partition_spec, row_shards
from apr_jax.train.recomputation import Recomputation

Batch = dict[str, jax.Array]
Logits = Callable[[jax.Array], jax.Array]
LogProbs = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The scores of given target tokens from one forward pass."""

    logprob_BT: jax.Array  # float32, log pi(target)
    top_BT: jax.Array  # bool: the target is the most probable token


def num_chunks(batch: int, time: int, vocab: int, max_logits: int) -> int:
    """Return the least divisor C of `time` with batch * (time / C) * vocab <= max_logits, or else `time`."""
    return next((c for c in range(1, time + 1) if time % c == 0 and batch * (time // c) * vocab <= max_logits), time)


def token_scores(
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    logits: Logits,
    log_probs: LogProbs,
    vocab: int,
    max_logits: int,
    given: tuple[jax.Array, ...] = (),
) -> TokenScores:
    """Score the targets in chunks of time, so that [B, T, V] logits never exist when they are many.

    Args:
      hidden_BTD: the model's final hidden states.
      targets_BT: int32 token ids in [0, vocab).
      logits: hidden [..., D] -> float32 logits [..., V].
      log_probs: logits [..., V] and the same positions of `given` -> float32 normalised log-probabilities
        (`jax.nn.log_softmax` in SFT, the engine's sampling policy in GRPO).
      vocab: V. Each device holds at most `max_logits` elements of logits at a time; chunks are recomputed in the
        backward pass.
      given: arrays [B, T, ...].
    """
    batch, time = targets_BT.shape

    def score(hidden_BUD: jax.Array, targets_BU: jax.Array, *given: jax.Array) -> TokenScores:
        logprobs_BUV = log_probs(logits(hidden_BUD), *given)
        # A masked sum has a mask as its gradient; an index would have a scatter.
        ids_BUV = jax.lax.broadcasted_iota(jnp.int32, logprobs_BUV.shape, logprobs_BUV.ndim - 1)
        chosen_BUV = targets_BU[..., None] == ids_BUV
        picked_BU = jnp.sum(jnp.where(chosen_BUV, logprobs_BUV, 0.0), axis=-1)
        return TokenScores(picked_BU, picked_BU >= jnp.max(logprobs_BUV, axis=-1))

    chunks = num_chunks(-(-batch // num_row_shards()), time, vocab, max_logits)
    if chunks == 1:
        return score(hidden_BTD, targets_BT, *given)
    arrays_CBU = jax.tree.map(
        lambda x_BT: x_BT.reshape(batch, chunks, time // chunks, *x_BT.shape[2:]).swapaxes(0, 1),
        (hidden_BTD, targets_BT, *given),
    )
    scores_CBU = jax.lax.map(jax.checkpoint(lambda xs: score(*xs)), arrays_CBU)
    return jax.tree.map(lambda x_CBU: x_CBU.swapaxes(0, 1).reshape(batch, time), scores_CBU)


Scorer = Callable[[Params, Batch], TokenScores]


def make_scorer(
    model: ModelConfig,
    mesh: Mesh,
    log_probs: LogProbs,
    given: Sequence[str] = (),
    recomputation: Recomputation | None = None,
) -> Scorer:
    """Make a function (params, batch of packed rows) -> scores of the batch's targets.

    The batch's arrays named in `given` go to `log_probs`, after the logits. Attention kernels are mapped over the mesh,
    activations keep their rows on it, and the loss counts its chunks per device. A batch with `reach` has
    segments with branches (`data/prefixes.py`), one with `seen` is of workers on shared caches
    (`data/shared_sequences.py`). `recomputation` is by default what the model's configuration says without a look at
    memory.
    """
    platform = mesh.devices.flat[0].platform
    kernels = for_training(model, platform)
    recomputed = recomputation or Recomputation.of(model, mesh)
    structure = graphdef(dataclasses.replace(model, remat=recomputed.remat), kernels.ops)

    def score(params: Params, batch: Batch) -> TokenScores:
        llama = nnx.merge(structure, params)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), products(model, platform):
            hidden_BTD, _ = llama(batch["tokens"], _view(model, kernels, batch))
            arrays = tuple(batch[name] for name in given)
            return token_scores(
                hidden_BTD, batch["targets"], llama.logits, log_probs, model.vocab_size, recomputed.max_logits, arrays
            )

    return score


def _view(model: ModelConfig, kernels: TrainingKernels, batch: Batch) -> Any:
    """Return what the batch's tokens can see, a `View`."""
    ids_BT, positions_BT = batch["segment_ids"], batch["positions"]
    if "seen" in batch:
        rows = SharedRows(ids_BT, batch["workers"], batch["places"], batch["seen"])
        return shared_training_rows(model, positions_BT, rows)
    if "lengths" in batch and kernels.packed is not None:
        return packed_rows(model, positions_BT, batch["lengths"], kernels.packed)
    return training_rows(model, positions_BT, ids_BT, batch.get("reach"), kernels.attention)


def as_placed(rows: Mapping[str, np.ndarray], mesh: Mesh, groups: int = 1) -> Mapping[str, np.ndarray]:
    """Return rows `[B, T]` as a mesh's devices take them, `groups` parts of them in turn.

    For GPUs rows whose segments have no branches are put in another order, and the lengths of segments stand beside
    them (`data/segments.py`). cuDNN takes no rows of an odd length.
    """
    on_gpu, length = mesh.devices.flat[0].platform in GPUS, rows["segment_ids"].shape[1]
    apart = on_gpu and length % 2 == 0 and not {"reach", "seen"} & rows.keys()
    return with_lengths(rows, groups) if apart else rows


def to_mesh(rows: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int | None = None) -> Batch:
    """Put rows [B, T] on the mesh, split over its batch axes; with `microbatches` M as [M, B / M, T].

    In a job of several hosts each gives all rows; only its own devices' go to the mesh.
    """
    rows = as_placed(rows, mesh, (microbatches or 1) * row_shards(mesh))
    batch_axis = partition_spec(BATCH_AXES) if microbatches is None else partition_spec(None, BATCH_AXES)
    sharding = NamedSharding(mesh, batch_axis)

    def place(rows_BT: np.ndarray) -> jax.Array:
        shaped = rows_BT if microbatches is None else rows_BT.reshape(microbatches, -1, *rows_BT.shape[1:])
        return hosts.place(shaped, sharding)

    return {name: place(rows_BT) for name, rows_BT in rows.items()}


def fetch(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Wait for device scalars, and return them as Python floats."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
