"""Supervised fine-tuning on demonstrations (paper section 4.2): every call of every thread is a training sequence.

The loss is `sum_t weight_t * -log pi(target_t)`, with weights that the host computed once for the global batch. So
gradient accumulation, packing and sharding only reorder one sum and cannot change what is learnt.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from apr_jax.config import Config, LoraConfig, ModelConfig, SFTConfig
from apr_jax.data.packing import pad_rows
from apr_jax.data.pipeline import SequenceOptions
from apr_jax.model.lora import ALL_WEIGHTS, Trained, make_merge, merge
from apr_jax.model.params import Params
from apr_jax.model.placement import abstract_params_on
from apr_jax.parallel import hosts
from apr_jax.parallel.device_memory import local_bytes
from apr_jax.progress import progress
from apr_jax.reasoning import METHODS
from apr_jax.train.optimizer import make_optimizer, schedule
from apr_jax.train.phase import Phase
from apr_jax.train.recomputation import Recomputation
from apr_jax.train.scorer import Batch, Scorer, fetch, make_scorer, to_mesh
from apr_jax.train.state import TrainState, abstract_state, apply_gradients, state_shardings

Rows = Mapping[str, np.ndarray]
Metrics = dict[str, jax.Array]


class RowIterator(Protocol):
    """The source of training: packed rows, a global batch at a time, and a JSON-able position in them."""

    def __next__(self) -> Rows: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def sft_options(config: Config) -> SequenceOptions:
    """Return how SFT's demonstrations become sequences."""
    data = config.data
    return SequenceOptions(
        row_len=config.sft.row_len,
        replay_weight=data.replay_weight,
        loss_on_context=data.loss_on_context,
        shares_cache=METHODS[data.method].shares_cache,
    )


def make_sft_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    mesh: Mesh,
    lora: LoraConfig = ALL_WEIGHTS,
    recomputation: Recomputation | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Make the jitted update (state, batch [M, B / M, T], base) -> (state, metrics). The state given is donated.

    Gradients of the M microbatches are summed; `weights` sum to 1 over the whole batch, so the result does not depend
    on M. `rate` is only logged. `base` are the weights that adapters belong to; it is left out with rank 0.
    """
    scorer = make_scorer(model, mesh, jax.nn.log_softmax, recomputation=recomputation)
    loss_fn = jax.value_and_grad(functools.partial(_loss, scorer, lora), has_aux=True)
    shardings = state_shardings(mesh, model, optimizer, lora)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: TrainState, batch: Batch, base: Params | None = None) -> tuple[TrainState, Metrics]:
        def accumulate(grads: Trained, microbatch: Batch) -> tuple[Trained, Metrics]:
            (_, sums), new = loss_fn(state.params, base, microbatch)
            return jax.tree.map(jnp.add, grads, new), sums

        if len(batch["tokens"]) == 1:
            (_, sums), grads = loss_fn(state.params, base, jax.tree.map(lambda x: x[0], batch))
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, sums_M = jax.lax.scan(accumulate, zeros, batch)
            sums = jax.tree.map(jnp.sum, sums_M)
        updated, applied = apply_gradients(state, grads, sums["loss"], optimizer)
        return updated, {
            "loss": sums["loss"],
            "token_accuracy": sums["correct"] / sums["tokens"],
            **applied,
            "learning_rate": rate(state.step),
        }

    return step


def sft_recomputation(
    config: SFTConfig, model: ModelConfig, mesh: Mesh, lora: LoraConfig = ALL_WEIGHTS
) -> Recomputation:
    """Return what SFT's backward pass recomputes: its device holds the state, two gradients, and what adapters need."""

    def held() -> int:
        state = abstract_state(mesh, model, make_optimizer(config.optimizer, config.num_steps), lora)
        merged = 2 * local_bytes(abstract_params_on(mesh, model)) if lora.rank else 0  # the base, and with its adapters
        return local_bytes(state) + 2 * local_bytes(state.params) + merged

    tokens = config.rows_per_step // config.microbatches * config.row_len
    return Recomputation.fitting(model, mesh, tokens, held)


def make_validation(model: ModelConfig, mesh: Mesh, lora: LoraConfig = ALL_WEIGHTS) -> Callable[..., Metrics]:
    """Make a jitted function (trained, batch [M, B / M, T], base) -> validation metrics."""
    loss_fn = functools.partial(_loss, make_scorer(model, mesh, jax.nn.log_softmax), lora)

    @jax.jit
    def validate(trained: Trained, batch: Batch, base: Params | None = None) -> Metrics:
        sums = jax.tree.map(jnp.sum, jax.lax.map(lambda microbatch: loss_fn(trained, base, microbatch)[1], batch))
        return {"validation_loss": sums["loss"], "validation_token_accuracy": sums["correct"] / sums["tokens"]}

    return validate


def train_sft(
    config: SFTConfig,
    model: ModelConfig,
    mesh: Mesh,
    phase: Phase,
    *,
    rows: RowIterator,
    validation_rows: Rows,
    seed: int,
    params: Params | None = None,
    lora: LoraConfig = ALL_WEIGHTS,
) -> Params:
    """Train from the last checkpoint, or else from the start, to `config.num_steps`. Returns the policy.

    Args:
      rows: batches of `config.rows_per_step` rows; its position is saved and restored with the weights.
      validation_rows: one batch, whose loss is measured every `config.validate_every` steps and at the end.
      seed: of the initial weights, where `params` does not give them, or of the adapters.
      params: the weights to start from. With adapters they are needed after a checkpoint as well.
    Raises:
      StoppedError: a signal came; the state is saved.
      FloatingPointError: too many steps in a row were not finite (`phase.skipped`).
    """
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    state, position = phase.start(mesh, model, optimizer, params, seed, lora)
    base = params if lora.rank else None
    if position is not None:
        rows.set_state(position)
    start = int(state.step)
    rate = schedule(config.optimizer, config.num_steps, config.optimizer.learning_rate)
    recomputation = sft_recomputation(config, model, mesh, lora)
    step_fn = make_sft_step(model, optimizer, rate, mesh, lora, recomputation)
    validate = make_validation(model, mesh, lora)
    held_out = _validation_batch(validation_rows, mesh, config.rows_per_step // config.microbatches)
    log = _Log(phase)
    with progress(config.num_steps - start, "SFT", "step", hosts.messages()) as bar:
        for step in range(start + 1, config.num_steps + 1):
            asked = time.perf_counter()
            batch = dict(next(rows))
            waited = time.perf_counter() - asked
            batch["weights"] = normalise(batch["weights"])
            state, metrics = step_fn(state, to_mesh(batch, mesh, config.microbatches), base)
            if step % config.validate_every == 0 or step == config.num_steps:
                metrics |= validate(state.params, held_out, base)
            bar.update(1, **log.add(_Step(step, batch, waited, metrics)))
            stopping = phase.stopping()
            if stopping or step % config.checkpoint_every == 0 or step == config.num_steps:
                written = log.flush()
                if "validation_loss" in written:
                    phase.checkpoints.score(step, written["validation_loss"])
                phase.save(step, state, rows.get_state())
            if stopping:
                phase.stop.check()
    return make_merge(mesh, model, lora)(base, state.params)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A dispatched step."""

    number: int
    batch: Rows  # on the host
    waited: float  # seconds that the host waited for `batch`, while the device was at work on the step before
    metrics: Metrics


class _Log:
    """A log that writes a step's metrics when the next step is under way, so the host never waits for the device."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._pending: _Step | None = None
        self._last = time.perf_counter()

    def add(self, step: _Step) -> dict[str, float]:
        """Take a dispatched step, and return the loss of the one before for the progress bar."""
        written = self.flush()
        self._pending = step
        return {"loss": written["loss"]} if written else {}

    def flush(self) -> dict[str, float]:
        """Write the metrics of the last step, if they are not written yet, and return them."""
        if self._pending is None:
            return {}
        step, self._pending = self._pending, None
        ids_BT = step.batch["segment_ids"]
        tokens = int(np.count_nonzero(ids_BT))
        metrics = {**fetch(step.metrics), "tokens": tokens, "packing": tokens / ids_BT.size}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._phase.writer.write("sft", step.number, metrics)
        timings = {"seconds": seconds, "tokens_per_second": tokens / seconds, "data_seconds": step.waited}
        self._phase.writer.write_timings("sft", step.number, timings)
        self._phase.skipped.note("sft", step.number, metrics["skipped_rate"], lambda: step.batch)
        return metrics


def _loss(
    scorer: Scorer, lora: LoraConfig, trained: Trained, base: Params | None, batch: Batch
) -> tuple[jax.Array, Metrics]:
    scores = scorer(merge(base, trained, lora), batch)
    loss = weighted_nll(scores.logprob_BT, batch["weights"])
    learnt_BT = batch["weights"] > 0
    return loss, {"loss": loss, "correct": jnp.sum(scores.top_BT & learnt_BT), "tokens": jnp.sum(learnt_BT)}


def _validation_batch(rows: Rows, mesh: Mesh, rows_per_microbatch: int) -> Batch:
    padded = pad_rows({**rows, "weights": normalise(rows["weights"])}, rows_per_microbatch)
    return to_mesh(padded, mesh, len(padded["tokens"]) // rows_per_microbatch)


def weighted_nll(logprob_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Return SFT's loss, sum_t weight_t * -log pi(target_t). Weights of a global batch sum to 1 (`normalise`)."""
    return -jnp.sum(weights_BT * logprob_BT)


def normalise(weights: np.ndarray) -> np.ndarray:
    """Scale a global batch's weights to sum 1 (float32). Raises ValueError when no token carries weight."""
    total = float(np.sum(weights, dtype=np.float64))
    if total <= 0:
        raise ValueError(f"a batch of shape {weights.shape} has no token to learn from: its weights sum to {total}")
    return (weights / total).astype(np.float32)
