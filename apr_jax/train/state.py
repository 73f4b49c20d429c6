"""The training state: one immutable pytree, created in place on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import LoraConfig, ModelConfig
from apr_jax.model.lora import ALL_WEIGHTS, Trained, abstract_trained, init_trained, trained_shardings
from apr_jax.model.params import Params
from apr_jax.model.placement import with_sharding
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import replicated, split_over_data


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. `step` counts updates done; parameters are float32."""

    step: jax.Array
    params: Trained
    opt_state: optax.OptState


def state_shardings(
    mesh: Mesh, model: ModelConfig, optimizer: optax.GradientTransformation, lora: LoraConfig = ALL_WEIGHTS
) -> Any:
    """Return a TrainState of NamedShardings: moments lie like their parameter and are split over data too.

    So each device does its part of the optimiser's work, and the new parameters are gathered (ZeRO stage 1: Rajbhandari
    et al. 2020, section 5.1).
    """
    params = trained_shardings(mesh, model, lora)
    by_path = {jax.tree_util.keystr(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}
    everywhere = replicated(mesh)

    def of_moment(path: Any, leaf: Any) -> NamedSharding:
        suffixes = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = next((by_path[suffix] for suffix in suffixes if suffix in by_path), None)
        return everywhere if found is None else split_over_data(found, leaf.shape)

    opt_state = jax.eval_shape(optimizer.init, abstract_trained(model, lora))
    moments = jax.tree_util.tree_map_with_path(of_moment, opt_state)
    return TrainState(everywhere, params, moments)  # type: ignore[arg-type]


def abstract_state(
    mesh: Mesh, model: ModelConfig, optimizer: optax.GradientTransformation, lora: LoraConfig = ALL_WEIGHTS
) -> TrainState:
    """Return shapes, types and shardings of the state: what a checkpoint is restored into."""

    def init(params: Trained) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(init, abstract_trained(model, lora))
    return jax.tree.map(with_sharding, shapes, state_shardings(mesh, model, optimizer, lora))


def create_state(
    mesh: Mesh,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    params: Params | None = None,
    seed: int = 0,
    lora: LoraConfig = ALL_WEIGHTS,
) -> TrainState:
    """Create a state at step 0 with `params` (copied, so that the state may be donated), or fresh ones from `seed`.

    With a rank its parameters are adapters, drawn from `seed`.
    """
    target = state_shardings(mesh, model, optimizer, lora)
    start = init_trained(model, lora, params, seed)

    def init(params: Trained) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

    return jax.jit(init, out_shardings=target)(hosts.place(start, target.params))


def apply_gradients(
    state: TrainState,
    grads: Trained,
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    signal: jax.Array | bool = True,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply one optimiser update, unless there is nothing to learn, or something is not finite; the device decides.

    An update that is left out counts in `state.step` and changes nothing else: neither weights nor moments nor the
    optimiser's own counters, which its schedule follows. It is left out where

    * `signal` is False or the gradient is exactly 0. Momentum and weight decay would move weights all the same, and
      optimisers that normalise (Adam, Muon) make a whole update of a gradient of mere rounding.
    * the loss, the gradients' norm, or anything of the weights and moments that would come out is not finite.

    Returns: the new state, and metrics: `grad_norm`, the global norm before clipping; `skipped_rate`, 1 or 0, for what
      is not finite; and `no_signal_rate`, 1 or 0.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    signal = jnp.asarray(signal) & (norm != 0)

    def move(params: Trained, opt_state: optax.OptState) -> tuple[Trained, jax.Array]:
        updates, new_state = optimizer.update(grads, opt_state, params)
        moved = optax.apply_updates(params, updates)
        sound = _all_finite((moved, new_state))
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), moved, params), sound

    def remember(params: Trained, opt_state: optax.OptState) -> optax.OptState:
        return optimizer.update(grads, opt_state, params)[1]

    # Moments are computed once more instead of being held until all is known to be finite: XLA leaves out what only the
    # weights need, and writes them in place. It would need twice their memory otherwise.
    wanted, given = finite & signal, (state.params, state.opt_state)
    params, sound = jax.lax.cond(wanted, move, lambda params, _: (params, finite), *given)
    opt_state = jax.lax.cond(wanted & sound, remember, lambda _, opt_state: opt_state, *given)
    as_rate = {"skipped_rate": ~sound, "no_signal_rate": finite & ~signal}
    metrics = {"grad_norm": norm, **{name: flag.astype(jnp.float32) for name, flag in as_rate.items()}}
    return TrainState(state.step + 1, params, opt_state), metrics


def _all_finite(tree: Any) -> jax.Array:
    """Return True if no number of a tree is infinite or NaN."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(flags))
