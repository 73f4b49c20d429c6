"""Optax optimisers and learning-rate schedules from an `OptimizerConfig`."""

import math
from typing import Any

import jax
import optax
import optax.contrib

from apr_jax.config import OptimizerConfig
from apr_jax.model.params import logical_axes


def schedule(config: OptimizerConfig, num_steps: int, peak: float) -> optax.Schedule:
    """Return the learning rate as a function of the step, of which 0 is the first.

    It rises linearly from initial_scale * peak to peak over warmup_steps. Then it is constant; or a cosine that ends at
    final_scale * peak at step num_steps (Loshchilov and Hutter 2017, eq. 5 without restarts); or constant up to the
    last decay_steps, in which it falls linearly to there (warmup-stable-decay: Hu et al. 2024, arXiv 2404.06395,
    section 4).
    """
    rest = max(num_steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    elif config.schedule == "trapezoid":
        decay = min(max(config.decay_steps, 1), rest)
        after = optax.linear_schedule(peak, config.final_scale * peak, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(config.initial_scale * peak, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Make an optimiser that clips by global norm and then takes a step of AdamW, or of Muon.

    Muon (orthogonalised Nesterov momentum, Jordan et al. 2024) updates the hidden matrices, and Adam with Nesterov
    momentum the rest. Weight decay is decoupled and spares norms; under Muon also embeddings and head.
    """
    adam_rate = schedule(config, num_steps, config.learning_rate)
    if config.name == "adamw":
        update = optax.adamw(adam_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_matrices)
    else:
        update = optax.contrib.muon(
            schedule(config, num_steps, config.muon_learning_rate),
            weight_decay=config.weight_decay,
            weight_decay_mask=_matrices,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=adam_rate,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    clip = config.clip_norm if config.clip_norm > 0 else math.inf
    return optax.chain(optax.clip_by_global_norm(clip), update)


def muon_dimensions(params: Any) -> Any:
    """Return optax.contrib.MuonDimensionNumbers for Muon's matrices [in, out], and None for what Adam updates.

    Embeddings and head are tables of rows rather than maps between hidden spaces. They stay with Adam, as do the norms.
    """

    def dimensions(param: jax.Array, axes: Any) -> optax.contrib.MuonDimensionNumbers | None:
        hidden = param.ndim == 2 and "vocab" not in axes
        return optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1) if hidden else None

    return jax.tree.map(dimensions, params, logical_axes(params))


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda param: param.ndim >= 2, params)
