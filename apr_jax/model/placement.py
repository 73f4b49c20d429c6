"""The parameters' places on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ModelConfig
from apr_jax.model.params import Params, abstract_params, logical_axes
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import param_shardings


def model_shardings(mesh: Mesh, model: ModelConfig) -> Any:
    """Return a NamedSharding for each parameter."""
    params = abstract_params(model)
    return param_shardings(mesh, params, logical_axes(params))


def abstract_params_on(mesh: Mesh, model: ModelConfig) -> Params:
    """Return the parameters' shapes, types and shardings: what a saved policy is restored into."""
    return jax.tree.map(with_sharding, abstract_params(model), model_shardings(mesh, model))


def place_params(params: Any, mesh: Mesh, model: ModelConfig) -> Params:
    """Put parameters, which every host of a job holds, on the mesh."""
    return hosts.place(params, model_shardings(mesh, model))


def with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the same shape and type with a place."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # type: ignore[no-untyped-call]
