"""The training state: one immutable pytree, created in place on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ModelConfig
from apr_jax.model.params import Params, abstract_params, init_params
from apr_jax.model.placement import model_shardings, with_sharding
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import replicated, split_over_data


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. `step` counts updates done; parameters are float32."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def state_shardings(mesh: Mesh, model: ModelConfig, optimizer: optax.GradientTransformation) -> Any:
    """Return a TrainState of NamedShardings: moments lie like their parameter and are split over data too.

    So each device does its part of the optimiser's work, and the new parameters are gathered (ZeRO stage 1: Rajbhandari
    et al. 2020, section 5.1).
    """
    params = model_shardings(mesh, model)
    by_path = {jax.tree_util.keystr(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}
    everywhere = replicated(mesh)

    def of_moment(path: Any, leaf: Any) -> NamedSharding:
        suffixes = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = next((by_path[suffix] for suffix in suffixes if suffix in by_path), None)
        return everywhere if found is None else split_over_data(found, leaf.shape)

    opt_state = jax.eval_shape(optimizer.init, abstract_params(model))
    moments = jax.tree_util.tree_map_with_path(of_moment, opt_state)
    return TrainState(everywhere, params, moments)  # type: ignore[arg-type]


def abstract_state(mesh: Mesh, model: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Return shapes, types and shardings of the state: what a checkpoint is restored into."""

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(init, abstract_params(model))
    return jax.tree.map(with_sharding, shapes, state_shardings(mesh, model, optimizer))


def create_state(
    mesh: Mesh, model: ModelConfig, optimizer: optax.GradientTransformation, params: Params | None = None, seed: int = 0
) -> TrainState:
    """Create a state at step 0 with `params` (copied, so that the state may be donated), or fresh ones from `seed`."""
    target = state_shardings(mesh, model, optimizer)
    start = init_params(model, seed) if params is None else params

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

    return jax.jit(init, out_shardings=target)(hosts.place(start, target.params))


def apply_gradients(
    state: TrainState, grads: Params, loss: jax.Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply one optimiser update, unless the loss or the gradients' norm is not finite; the device decides.

    A step that is left out counts in `state.step` and changes nothing else: neither weights nor moments nor the
    optimiser's own counters.

    Returns: the new state, and metrics: `grad_norm`, the global norm before clipping, and `skipped_rate`, 1 or 0.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)

    def update(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    kept = jax.lax.cond(finite, update, lambda *kept: kept, state.params, state.opt_state)
    metrics = {"grad_norm": norm, "skipped_rate": 1.0 - finite.astype(jnp.float32)}
    return TrainState(state.step + 1, *kept), metrics
