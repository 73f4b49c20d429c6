"""Group-relative policy optimisation on the engine's own rollouts (paper section 4.3)."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.config import Config
from apr_jax.data.packing import pack, pad_rows
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine import policy_masks, sampling
from apr_jax.engine.constraints import Gate
from apr_jax.engine.threads import RolloutKey
from apr_jax.model.attention import takes_branches
from apr_jax.model.llama import Params
from apr_jax.model.placement import model_shardings
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import replicated
from apr_jax.progress import progress
from apr_jax.reasoning.outcome import banned_tokens, make_settings, spawn_gate
from apr_jax.reasoning.programs import PROGRAMS, make_program
from apr_jax.train.losses import GRPOTerms, GRPOTokens, LogProbs, grpo_loss
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.phase import Phase
from apr_jax.train.rl.dynamic_sampling import Sample, draw
from apr_jax.train.rl.hosted_engine import RolloutEngine
from apr_jax.train.rl.objectives import make_objective
from apr_jax.train.rl.rollouts import (
    Scored,
    gap_metrics,
    rollout_metrics,
    rollout_seed,
    score,
    training_sequences,
    truncated_share,
)
from apr_jax.train.scorer import Batch, fetch, make_scorer, to_mesh
from apr_jax.train.state import TrainState, apply_gradients, state_shardings

Sums = tuple[Params, GRPOTerms]


class Updater:
    """The jitted parts of a GRPO update. Compiled once for each size of a microbatch, whatever their number."""

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> None:
        self._config, self._mesh = config, mesh
        self.optimizer = make_optimizer(config.grpo.optimizer, config.grpo.num_steps * config.grpo.inner_updates)
        self.objective = make_objective(config.grpo)
        self.gate = spawn_gate(config, tokenizer)
        policy = _sampling_policy(config, tokenizer, self.gate)
        self._scorer = make_scorer(config.model, mesh, policy, ("bans", "allowed") if self.gate else ())
        self._reference = jax.jit(lambda params, batch: self._scorer(params, batch).logprob_BT)
        self._accumulate = jax.jit(self._add_gradients, donate_argnums=0)
        self._apply = jax.jit(
            lambda state, grads, loss: apply_gradients(state, grads, loss, self.optimizer),
            donate_argnums=0,
            out_shardings=(state_shardings(mesh, config.model, self.optimizer), None),
        )
        self._mean = jax.jit(_mean_metrics)  # one program: some forty small ones a step can lock up XLA's CPU devices
        self._zeros = jax.jit(
            lambda params: (jax.tree.map(jnp.zeros_like, params), _zero_terms()),
            out_shardings=(model_shardings(mesh, config.model), replicated(mesh)),
        )

    def sequences(self, scored: Scored) -> list[dict[str, np.ndarray]]:
        """What the update learns from: the calls, with what a thread's calls have in common once where that can be."""
        grpo, model = self._config.grpo, self._config.model
        platform = self._mesh.devices.flat[0].platform
        share = takes_branches(model.attention, platform, jnp.dtype(model.compute_dtype), model.head_dim)
        return training_sequences(
            scored, grpo.kl_coef, self.gate, self.objective.weigh, share=grpo.row_len if share else 0
        )

    def microbatches(self, sequences: Sequence[dict[str, np.ndarray]]) -> list[Batch]:
        """Packs sequences into rows, and rows into microbatches on the mesh.

        What remains after the last full one goes into halves, quarters, .. of one: an empty row fills it up only where
        the mesh's rows would not divide otherwise.
        """
        if not sequences:
            return []
        shards = self._config.mesh.data * self._config.mesh.fsdp
        rows = pad_rows(_rows(sequences, self._config.grpo.row_len), shards)
        sizes = _microbatch_sizes(len(rows["tokens"]), self._config.grpo.rows_per_microbatch, shards)
        ends = np.cumsum(sizes)
        return [
            to_mesh({name: rows_BT[end - size : end] for name, rows_BT in rows.items()}, self._mesh)
            for end, size in zip(ends.tolist(), sizes, strict=True)
        ]

    def update(
        self, state: TrainState, microbatches: Sequence[Batch], reference: Params | None
    ) -> tuple[TrainState, dict[str, Any], list[jax.Array]]:
        """`grpo.inner_updates` optimiser steps on one set of rollouts. The state given is donated.

        The first update is on-policy: its old log-probabilities are its own, with ratio exactly 1, and the later
        updates refer to the same ones. So they cost no pass of their own.

        Args:
          reference: the reference policy, read when kl_coef > 0.
        Returns: the state, device metrics (means over the updates), and the old log-probabilities per microbatch.
        """
        references = [None if reference is None else self._reference(reference, batch) for batch in microbatches]
        old: list[jax.Array | None] = [None] * len(microbatches)
        updates: list[tuple[GRPOTerms, dict[str, jax.Array]]] = []
        for _ in range(self._config.grpo.inner_updates):
            sums: Sums = self._zeros(state.params)
            new = []
            for batch, old_BT, reference_BT in zip(microbatches, old, references, strict=True):
                sums, logprob_BT = self._accumulate(sums, state.params, batch, old_BT, reference_BT)
                new.append(logprob_BT)
            old = [logprob_BT if old_BT is None else old_BT for logprob_BT, old_BT in zip(new, old, strict=True)]
            grads, terms = sums
            state, applied = self._apply(state, grads, terms.policy_loss + terms.kl_loss)
            updates.append((terms, applied))
        return state, self._mean(updates), [old_BT for old_BT in old if old_BT is not None]

    def _add_gradients(
        self,
        sums: Sums,
        params: Params,
        batch: Batch,
        old_BT: jax.Array | None,
        reference_BT: jax.Array | None,
    ) -> tuple[Sums, jax.Array]:
        grpo = self._config.grpo
        tokens = GRPOTokens(batch["advantage"], batch["policy_weight"], batch["kl_weight"], batch["rollout_logprob"])

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[GRPOTerms, jax.Array]]:
            logprob_BT = self._scorer(params, batch).logprob_BT
            loss, terms = grpo_loss(
                logprob_BT,
                logprob_BT if old_BT is None else old_BT,
                logprob_BT if reference_BT is None else reference_BT,
                tokens,
                clip_ratio=grpo.clip_ratio,
                clip_ratio_high=grpo.clip_ratio_high,
                importance_cap=grpo.importance_cap,
                surrogate=self.objective.surrogate(_call_ids(batch)),
            )
            return loss, (terms, logprob_BT)

        (_, (terms, logprob_BT)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(jnp.add, sums, (grads, terms)), logprob_BT


def _sampling_policy(config: Config, tokenizer: Tokenizer, gate: Gate | None) -> LogProbs:
    """The engine's policy: a function of logits `[B, T, V]`, and with a gate of `bans` and `allowed` of the batch."""
    mask_V = np.zeros(config.model.vocab_size, bool)
    mask_V[list(banned_tokens(tokenizer, config.model.vocab_size))] = True
    banned_V = jnp.asarray(mask_V)
    log_probs = functools.partial(sampling.log_probs, temperature=config.rollout.temperature)
    if gate is None:
        return functools.partial(log_probs, banned_mask=banned_V)
    masks = jax.tree.map(jnp.asarray, policy_masks.gate_masks(gate, config.model.vocab_size))
    of_row = jax.vmap(policy_masks.banned_mask, (None, None, 0, 0))

    def held(logits_BTV: jax.Array, bans_BT: jax.Array, allowed_BTD: jax.Array) -> jax.Array:
        banned_BTV = jax.vmap(of_row, (None, None, 0, 0))(banned_V, masks, bans_BT, allowed_BTD - 1)
        return log_probs(logits_BTV, banned_mask=banned_BTV)

    return held


def train_grpo(
    config: Config,
    mesh: Mesh,
    *,
    params: Params,
    reference: Params | None,
    problems: Sequence[Any],
    tokenizer: Tokenizer,
    engine: RolloutEngine,
    phase: Phase,
    validate: Callable[[], float],
    keep: Callable[[int, Sample], None],
) -> Params:
    """Trains from `params`, or from the last checkpoint, to `config.grpo.num_steps`. Returns the policy.

    Args:
      reference: the policy that the KL term refers to; None when kl_coef is 0.
      problems: the train split.
      validate: accuracy of the engine's policy on held-out problems, asked for every `grpo.validate_every` steps. It is
        the policy that the next step's rollouts are drawn from, and stands in that step's metrics.
      keep: told of the rollouts of each step that ends in a regular checkpoint, to keep some for people to read.
    Raises:
      StoppedError: a signal came; the last finished step is saved.
      FloatingPointError: too many steps in a row had a loss or gradient that was not finite (`phase.skipped`).
      Whatever a program or the engine raises: a bug is no reward.
    """
    grpo = config.grpo
    updater = Updater(config, mesh, tokenizer)
    state, _ = phase.start(mesh, config.model, updater.optimizer, params)
    start = int(state.step) // grpo.inner_updates
    with progress(grpo.num_steps - start, "GRPO", "step", hosts.messages()) as bar:
        for step in range(start + 1, grpo.num_steps + 1):
            engine.set_params(state.params)
            with phase.interruptible(step - 1, state, {}):
                validation = _validate(validate, phase.checkpoints, grpo.validate_every, step - 1)
                began = time.perf_counter()
                sample = sample_step(config, engine, problems, tokenizer, step)
            rolled_out = time.perf_counter()
            sequences = updater.sequences(sample.learnt)
            microbatches = updater.microbatches(sequences)
            state, device_metrics, old = updater.update(state, microbatches, reference)
            metrics = {
                **validation,
                **rollout_metrics(sample.scored, sample.asked, tokenizer, config),
                "rollout_rounds": sample.rounds,
                "dropped_groups": sample.dropped,
                **fetch(device_metrics),
                **_gap(microbatches, old, grpo.importance_cap),
                "packing": _packing(sequences, microbatches),
            }
            ended = time.perf_counter()
            phase.writer.write("grpo", step, metrics)
            phase.writer.write_timings("grpo", step, _timings(sample.scored, began, rolled_out, ended))
            bar.update(1, accuracy=metrics["accuracy"], children=metrics["children_per_rollout"])
            phase.skipped.note("grpo", step, metrics["skipped_rate"], functools.partial(_rows, sequences, grpo.row_len))
            stopping = phase.stop.agreed()
            regular = step % grpo.checkpoint_every == 0 or step == grpo.num_steps
            if regular:
                keep(step, sample)
            if regular or stopping:
                phase.save(step, state, {})
            if stopping:
                phase.stop.check()
    if not phase.checkpoints.has_score(grpo.num_steps):
        engine.set_params(state.params)
        with phase.stop.interrupting():
            _validate(validate, phase.checkpoints, grpo.validate_every, grpo.num_steps)
    return state.params


def _validate(validate: Callable[[], float], checkpoints: Checkpoints, every: int, step: int) -> dict[str, float]:
    """Validates and scores the policy after `step` where that is due; its metric, or nothing."""
    if not every or step % every:
        return {}
    accuracy = validate()
    if step:  # step 0 is the reference, which is no checkpoint of this phase
        checkpoints.score(step, accuracy)
    return {"validation_accuracy": accuracy}


def sample_step(
    config: Config,
    engine: RolloutEngine,
    problems: Sequence[Any],
    tokenizer: Tokenizer,
    step: int,
) -> Sample:
    """The scored rollouts of a step and the problem of each; a function of (seed, step) and the engine's policy."""
    grpo = config.grpo
    settings = make_settings(config, tokenizer)
    seed = rollout_seed(config.seed, step)

    def roll(chosen: Sequence[int]) -> tuple[Scored, list[Any]]:
        keys = [RolloutKey(index, sample) for index in chosen for sample in range(grpo.group_size)]
        asked = [problems[key.problem] for key in keys]
        programs = [
            (key, make_program(config.data.method, problem, settings, settings.task.programs or PROGRAMS))
            for key, problem in zip(keys, asked, strict=True)
        ]
        rollouts = engine.run(programs, seed=seed, temperature=config.rollout.temperature)
        return score(rollouts, asked, grpo, settings.task, tokenizer), asked

    return draw(
        roll,
        len(problems),
        prompts_per_step=grpo.prompts_per_step,
        group_size=grpo.group_size,
        max_resamples=grpo.max_resamples,
        seed=config.seed,
        step=step,
    )


def _rows(sequences: Sequence[dict[str, np.ndarray]], row_len: int) -> dict[str, np.ndarray]:
    return pack(sequences, row_len).rows


def _microbatch_sizes(rows: int, full: int, shards: int) -> list[int]:
    """Sizes that add up to `rows`, a multiple of `shards`: full ones, then halves of halves for what remains."""
    sizes, size = [], full
    while rows:
        while size > rows:
            size = max(shards, size // 2 // shards * shards)
        sizes.append(size)
        rows -= size
    return sizes


def _call_ids(batch: Batch) -> jax.Array:
    """Ids in [0, T] that tell the calls of a row apart, `[B, T]`: segments, or their branches."""
    ids_BT = batch["segment_ids"]
    if "call" not in batch:
        return ids_BT
    begins = [jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0))) for x in (ids_BT, batch["call"])]
    return jnp.cumsum(begins[0] | begins[1], axis=1, dtype=jnp.int32)


def _gap(microbatches: Sequence[Batch], old: Sequence[jax.Array], importance_cap: float) -> dict[str, float]:
    trainer, rollout = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for batch, old_BT in zip(microbatches, old, strict=True):
        generated_BT = hosts.whole_array(batch["policy_weight"]) > 0
        trainer.append(hosts.whole_array(old_BT)[generated_BT])
        rollout.append(hosts.whole_array(batch["rollout_logprob"])[generated_BT])
    drawn = np.concatenate(trainer), np.concatenate(rollout)
    return {**gap_metrics(*drawn), "importance_truncated": truncated_share(*drawn, importance_cap)}


def _packing(sequences: Sequence[Mapping[str, np.ndarray]], microbatches: Sequence[Batch]) -> float:
    """The share of the batch that is not padding, rows that only fill a microbatch included; 1 for no batch."""
    tokens = sum(len(sequence["tokens"]) for sequence in sequences)
    return tokens / sum(batch["tokens"].size for batch in microbatches) if microbatches else 1.0


def _timings(scored: Scored, began: float, rolled_out: float, ended: float) -> dict[str, float]:
    generated = sum(len(call.tokens) for rollout in scored.rollouts for call in rollout.calls)
    return {
        "seconds": ended - began,
        "rollout_seconds": rolled_out - began,
        "update_seconds": ended - rolled_out,
        "rollout_tokens_per_second": generated / (rolled_out - began),
        "latency_ms": sum(rollout.latency_ms for rollout in scored.rollouts) / len(scored.rollouts),
    }


def _zero_terms() -> GRPOTerms:
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return GRPOTerms(policy_loss=zero, kl_loss=zero, clipped=none, k3=zero, tokens=none)


def _mean_metrics(updates: Sequence[tuple[GRPOTerms, Mapping[str, jax.Array]]]) -> dict[str, jax.Array]:
    metrics = [{**_device_metrics(terms), **applied} for terms, applied in updates]
    return {name: jnp.asarray(sum(m[name] for m in metrics) / len(metrics)) for name in metrics[0]}


def _device_metrics(terms: GRPOTerms) -> dict[str, jax.Array]:
    tokens = jnp.maximum(terms.tokens, 1)
    return {
        "loss": terms.policy_loss + terms.kl_loss,
        "policy_loss": terms.policy_loss,
        "kl_loss": terms.kl_loss,
        "kl": terms.k3 / tokens,
        "clip_fraction": terms.clipped / tokens,
    }
