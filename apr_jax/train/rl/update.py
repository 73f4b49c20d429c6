"""The device side of a GRPO step: rows on the mesh, gradients of microbatches, and the optimiser's update."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import Config, ModelConfig
from apr_jax.data.packing import pack, pad_rows
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine import policy_masks
from apr_jax.engine.constraints import Gate
from apr_jax.engine.threads import Call, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.kernels import for_training
from apr_jax.model import sampling
from apr_jax.model.lora import Trained, merge
from apr_jax.model.params import Params, num_params
from apr_jax.model.placement import abstract_params_on, with_sharding
from apr_jax.model.truncation import keep_most, truncation_of
from apr_jax.parallel.device_memory import local_bytes
from apr_jax.parallel.mesh import BATCH_AXES, partition_spec, replicated, row_shards
from apr_jax.reasoning.settings import banned_tokens, spawn_gate
from apr_jax.train.hosted_engine import plan_engine
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.recomputation import Recomputation
from apr_jax.train.rl.objective import Terms, Tokens, choose_objective
from apr_jax.train.rl.sample import Scored
from apr_jax.train.rl.sequences import training_sequences
from apr_jax.train.scorer import Batch, LogProbs, as_placed, make_scorer, to_mesh
from apr_jax.train.state import TrainState, abstract_state, apply_gradients, state_shardings

Sums = tuple[Trained, Terms]

# k3 a token, in nats, between two compiled programs of one policy: its log-probabilities differ in their last bits.
_ROUNDING_KL = {"float32": 1e-6, "bfloat16": 1e-3}


class Updater:
    """The jitted parts of a GRPO update. Compiled once for each size of a microbatch, whatever their number."""

    def __init__(
        self, config: Config, mesh: Mesh, tokenizer: Tokenizer, recomputation: Recomputation | None = None
    ) -> None:
        """Make the functions. `recomputation` is by default what fits the memory (`grpo_recomputation`)."""
        self._config, self._mesh = config, mesh
        self.optimizer = make_optimizer(config.grpo.optimizer, config.grpo.num_steps * config.grpo.inner_updates)
        self._objective = choose_objective(config.grpo)
        self._gate = spawn_gate(config, tokenizer)
        policy = _sampling_policy(config, tokenizer, self._gate)
        self._cuts = truncation_of(config.rollout).cuts
        given = ("bans", "allowed") if self._gate else ("kept", "targets") if self._cuts else ()
        recomputation = recomputation or grpo_recomputation(config, mesh)
        self._scorer = make_scorer(config.model, mesh, policy, given, recomputation)
        self._reference = jax.jit(lambda params, batch: self._scorer(params, batch).logprob_BT)
        self._accumulate = jax.jit(self._add_gradients, donate_argnums=0)
        shardings = state_shardings(mesh, config.model, self.optimizer, config.lora)
        self._apply = jax.jit(
            self._apply_gradients,
            donate_argnums=0,
            out_shardings=(shardings, None),
        )
        self._mean = jax.jit(_mean_metrics)  # one program: some forty small ones a step can lock up XLA's CPU devices
        self._zeros = jax.jit(
            lambda params: (jax.tree.map(jnp.zeros_like, params), _zero_terms()),
            out_shardings=(shardings.params, replicated(mesh)),
        )

    def sequences(self, scored: Sequence[Scored]) -> list[dict[str, np.ndarray]]:
        """Return what the update learns from (`training_sequences`), with branches where they save work."""
        model, grpo = self._config.model, self._config.grpo
        kernels = for_training(model, self._mesh.devices.flat[0].platform)
        apart = functools.partial(training_sequences, grpo, scored, self._gate)
        if not kernels.takes_branches or kernels.packed is None:
            return apart(branches=kernels.takes_branches)
        ways = [apart(branches=False), apart(branches=True)]
        # Branches are told by a mask, with which attention sees whole rows.
        flops = [forward_flops(model, ways[0], None), forward_flops(model, ways[1], grpo.row_len)]
        return ways[flops[1] < flops[0]]

    def rows(self, sequences: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Pack sequences into rows `[B, row_len]`."""
        return pack(sequences, self._config.grpo.row_len).rows

    def microbatches(self, sequences: Sequence[dict[str, np.ndarray]]) -> list[Batch]:
        """Pack sequences into rows, and rows into microbatches on the mesh.

        The rows after the last full microbatch go into halves, quarters, .. of one. Empty rows are added only to make
        the number of rows a multiple of the mesh's shards.
        """
        if not sequences:
            return []
        shards = row_shards(self._mesh)
        rows = pad_rows(self.rows(sequences), shards)
        sizes = microbatch_sizes(len(rows["tokens"]), self._config.grpo.rows_per_microbatch, shards)
        ends = np.cumsum(sizes)
        return [
            to_mesh({name: rows_BT[end - size : end] for name, rows_BT in rows.items()}, self._mesh)
            for end, size in zip(ends.tolist(), sizes, strict=True)
        ]

    def update(
        self,
        state: TrainState,
        microbatches: Sequence[Batch],
        reference: Params | None,
        base: Params | None = None,
    ) -> tuple[TrainState, dict[str, Any], list[jax.Array]]:
        """Take `grpo.inner_updates` optimiser steps on one set of rollouts. The state given is donated.

        The first update is on-policy: its old log-probabilities are its own, so its ratio is exactly 1. Later updates
        refer to the same ones. So old log-probabilities cost no forward pass.

        Args:
          reference: the reference policy, read when kl_coef > 0.
          base: the weights that adapters belong to; None with rank 0.
        Returns: the state, device metrics (means over the updates), and the old log-probabilities per microbatch.
        """
        references = [None if reference is None else self._reference(reference, batch) for batch in microbatches]
        old: list[jax.Array | None] = [None] * len(microbatches)
        updates: list[tuple[Terms, dict[str, jax.Array]]] = []
        for _ in range(self._config.grpo.inner_updates):
            sums: Sums = self._zeros(state.params)
            new = []
            for batch, old_BT, reference_BT in zip(microbatches, old, references, strict=True):
                sums, logprob_BT = self._accumulate(sums, state.params, batch, old_BT, reference_BT, base)
                new.append(logprob_BT)
            old = [logprob_BT if old_BT is None else old_BT for logprob_BT, old_BT in zip(new, old, strict=True)]
            grads, terms = sums
            state, applied = self._apply(state, grads, terms)
            updates.append((terms, applied))
        return state, self._mean(updates), [old_BT for old_BT in old if old_BT is not None]

    def programs(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return the jitted functions of a full microbatch by name, each with its arguments as shapes with places."""
        grpo, everywhere = self._config.grpo, replicated(self._mesh)
        state = abstract_state(self._mesh, self._config.model, self.optimizer, self._config.lora)
        policy = abstract_params_on(self._mesh, self._config.model)
        batch, score_BT = self._abstract_microbatch()
        terms = jax.tree.map(lambda x: with_sharding(x, everywhere), jax.eval_shape(_zero_terms))
        old_BT = score_BT if grpo.inner_updates > 1 else None
        reference_BT = score_BT if grpo.kl_coef > 0 else None
        scored = {"grpo_reference": (self._reference, (policy, batch))} if grpo.kl_coef > 0 else {}
        base = (policy,) if self._config.lora.rank else ()
        gradients = (state.params, terms), state.params, batch, old_BT, reference_BT, *base
        return {
            "grpo_gradients": (self._accumulate, gradients),
            "grpo_update": (self._apply, (state, state.params, terms)),
            **scored,
        }

    def _abstract_microbatch(self) -> tuple[dict[str, Any], Any]:
        """Return the shapes of a full microbatch, as rollouts are packed, and of scores of its tokens `[B, T]`."""
        ints, floats = np.zeros(2, np.int32), np.zeros(1, np.float32)
        kept = ints[1:] if self._cuts else None
        call = Call((), ints[:1], ints[1:], floats, Stop(StopReason.LENGTH, None), 0, 0.0, 0.0, kept=kept)
        rollout = Rollout(RolloutKey(0, 0), None, (call,), 1, 0.0, Work())
        row = as_placed(self.rows(self.sequences([Scored(None, rollout, True, 1.0, 1.0, np.ones(1))])), self._mesh)
        size, place = self._config.grpo.rows_per_microbatch, NamedSharding(self._mesh, partition_spec(BATCH_AXES))

        def on_mesh(shape: tuple[int, ...], dtype: Any) -> Any:
            whole: Any = jax.ShapeDtypeStruct
            return whole((size, *shape), dtype, sharding=place)

        batch = {name: on_mesh(x.shape[1:], x.dtype) for name, x in row.items()}
        return batch, on_mesh((self._config.grpo.row_len,), jnp.float32)

    def _apply_gradients(
        self, state: TrainState, grads: Trained, terms: Terms
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take the optimiser's step if some token has an advantage, or the KL term is more than rounding."""
        kl = terms.k3 / jnp.maximum(terms.tokens, 1)
        signal = (terms.advantaged > 0) | (kl > _ROUNDING_KL[self._config.model.compute_dtype])
        return apply_gradients(state, grads, terms.loss, self.optimizer, signal)

    def _add_gradients(
        self,
        sums: Sums,
        trained: Trained,
        batch: Batch,
        old_BT: jax.Array | None,
        reference_BT: jax.Array | None,
        base: Params | None = None,
    ) -> tuple[Sums, jax.Array]:
        def loss_fn(trained: Trained) -> tuple[jax.Array, tuple[Terms, jax.Array]]:
            logprob_BT = self._scorer(merge(base, trained, self._config.lora), batch).logprob_BT
            tokens = Tokens(
                logprob_BT=logprob_BT,
                old_logprob_BT=logprob_BT if old_BT is None else old_BT,
                reference_logprob_BT=logprob_BT if reference_BT is None else reference_BT,
                rollout_logprob_BT=batch["rollout_logprob"],
                advantage_BT=batch["advantage"],
                policy_weight_BT=batch["policy_weight"],
                kl_weight_BT=batch["kl_weight"],
                call_BT=_call_ids(batch),
            )
            terms = self._objective.terms(self._config.grpo, tokens)
            return terms.loss, (terms, logprob_BT)

        (_, (terms, logprob_BT)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return jax.tree.map(jnp.add, sums, (grads, terms)), logprob_BT


def grpo_recomputation(config: Config, mesh: Mesh) -> Recomputation:
    """Return what GRPO's backward pass recomputes beside all that a run keeps on its device."""

    def held() -> int:
        plan = plan_engine(config, mesh).memory
        # Beside the sum of gradients there are a microbatch's own, or the base merged with its adapters.
        return plan.beside + plan.weights + plan.pages + local_bytes(abstract_params_on(mesh, config.model))

    return Recomputation.fitting(config.model, mesh, config.grpo.rows_per_microbatch * config.grpo.row_len, held)


def forward_flops(model: ModelConfig, sequences: Sequence[Mapping[str, np.ndarray]], row_len: int | None) -> float:
    """Count FLOPs of a forward pass over sequences whose tokens attend in rows of `row_len`; None: in themselves."""
    lengths = np.array([len(sequence["tokens"]) for sequence in sequences], np.float64)
    products = 2 * (num_params(model).non_embedding + model.embed_dim * model.vocab_size)
    pairs = 4 * model.num_layers * model.num_heads * model.head_dim / 2
    return float(np.sum(lengths * (products + pairs * (lengths if row_len is None else row_len))))


def microbatch_sizes(rows: int, full: int, shards: int) -> list[int]:
    """Return sizes that add up to `rows`, a multiple of `shards`: full ones, then halves of halves for the rest."""
    sizes, size = [], full
    while rows:
        while size > rows:
            size = max(shards, size // 2 // shards * shards)
        sizes.append(size)
        rows -= size
    return sizes


def _sampling_policy(config: Config, tokenizer: Tokenizer, gate: Gate | None) -> LogProbs:
    """Return the engine's policy: a function of logits `[B, T, V]`.

    With a gate it is one of `bans` and `allowed`, too, and where it is truncated, of `kept` and the targets.
    """
    mask_V = np.zeros(config.model.vocab_size, bool)
    mask_V[list(banned_tokens(tokenizer, config.model.vocab_size))] = True
    banned_V = jnp.asarray(mask_V)
    log_probs = functools.partial(sampling.log_probs, temperature=config.rollout.temperature)
    if gate is None and not truncation_of(config.rollout).cuts:
        return functools.partial(log_probs, banned_mask=banned_V)
    if gate is None:
        return lambda logits_BTV, kept_BT, targets_BT: keep_most(
            log_probs(logits_BTV, banned_mask=banned_V), kept_BT, targets_BT
        )
    masks = jax.tree.map(jnp.asarray, policy_masks.gate_masks(gate, config.model.vocab_size))
    mask_row = jax.vmap(policy_masks.banned_mask, (None, None, 0, 0))

    def constrained(logits_BTV: jax.Array, bans_BT: jax.Array, allowed_BTD: jax.Array) -> jax.Array:
        banned_BTV = jax.vmap(mask_row, (None, None, 0, 0))(banned_V, masks, bans_BT, allowed_BTD - 1)
        return log_probs(logits_BTV, banned_mask=banned_BTV)

    return constrained


def _call_ids(batch: Batch) -> jax.Array:
    """Return ids in [0, T] that tell the calls of a row apart, `[B, T]`: segments, or their branches."""
    ids_BT = batch["segment_ids"]
    if "call" not in batch:
        return ids_BT
    begins = [jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0))) for x in (ids_BT, batch["call"])]
    return jnp.cumsum(begins[0] | begins[1], axis=1, dtype=jnp.int32)


def _zero_terms() -> Terms:
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return Terms(policy_loss=zero, kl_loss=zero, clipped=none, k3=zero, tokens=none, advantaged=none)


def _mean_metrics(updates: Sequence[tuple[Terms, Mapping[str, jax.Array]]]) -> dict[str, jax.Array]:
    metrics = [{**_device_metrics(terms), **applied} for terms, applied in updates]
    return {name: jnp.asarray(sum(m[name] for m in metrics) / len(metrics)) for name in metrics[0]}


def _device_metrics(terms: Terms) -> dict[str, jax.Array]:
    tokens = jnp.maximum(terms.tokens, 1)
    return {
        "loss": terms.loss,
        "policy_loss": terms.policy_loss,
        "kl_loss": terms.kl_loss,
        "kl": terms.k3 / tokens,
        "clip_fraction": terms.clipped / tokens,
    }
