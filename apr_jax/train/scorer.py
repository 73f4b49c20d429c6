"""The forward pass that both trainers share, and batches on their way to the mesh and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ModelConfig
from apr_jax.kernels import TrainingKernels, for_training
from apr_jax.model.params import Params, graphdef
from apr_jax.model.views.shared_training import SharedRows, shared_training_rows
from apr_jax.model.views.training import training_rows
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import BATCH_AXES, partition_spec
from apr_jax.train.losses import LogProbs, TokenScores, token_scores

Batch = dict[str, jax.Array]
Scorer = Callable[[Params, Batch], TokenScores]


def make_scorer(model: ModelConfig, mesh: Mesh, log_probs: LogProbs, given: Sequence[str] = ()) -> Scorer:
    """Make a function (params, batch of packed rows) -> scores of the batch's targets.

    The batch's arrays named in `given` go to `log_probs`, after the logits. Attention kernels are mapped over the mesh,
    activations keep their rows on it, and the loss counts its chunks per device. A batch with `reach` has
    segments with branches (`data/prefixes.py`), one with `seen` is of workers on shared caches
    (`data/shared_sequences.py`).
    """
    kernels = for_training(model, mesh.devices.flat[0].platform)
    structure = graphdef(model, kernels.ops)

    def score(params: Params, batch: Batch) -> TokenScores:
        llama = nnx.merge(structure, params)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hidden_BTD, _ = llama(batch["tokens"], _view(model, kernels, batch))
            arrays = tuple(batch[name] for name in given)
            return token_scores(hidden_BTD, batch["targets"], llama.logits, log_probs, model.vocab_size, given=arrays)

    return score


def _view(model: ModelConfig, kernels: TrainingKernels, batch: Batch) -> Any:
    """Return what the batch's tokens can see, a `View`."""
    ids_BT, positions_BT = batch["segment_ids"], batch["positions"]
    if "seen" in batch:
        rows = SharedRows(ids_BT, batch["workers"], batch["places"], batch["seen"])
        return shared_training_rows(model, positions_BT, rows)
    return training_rows(model, positions_BT, ids_BT, batch.get("reach"), kernels.attention)


def to_mesh(rows: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int | None = None) -> Batch:
    """Put rows [B, T] on the mesh, split over its batch axes; with `microbatches` M as [M, B / M, T].

    In a job of several hosts each gives all rows; only its own devices' go to the mesh.
    """
    batch_axis = partition_spec(BATCH_AXES) if microbatches is None else partition_spec(None, BATCH_AXES)
    sharding = NamedSharding(mesh, batch_axis)

    def place(rows_BT: np.ndarray) -> jax.Array:
        shaped = rows_BT if microbatches is None else rows_BT.reshape(microbatches, -1, *rows_BT.shape[1:])
        placed: jax.Array = hosts.place(shaped, sharding)
        return placed

    return {name: place(rows_BT) for name, rows_BT in rows.items()}


def fetch(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Wait for device scalars, and return them as Python floats."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
