"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * A B, where A and B alone are trained.

Adapters are a tree of `{matrix: {"lora_a": A, "lora_b": B}}`, with the dotted names of the policy's matrices. With
`lora.rank` 0 all weights are trained: what is trained is then the policy itself, and there is no base.

Shapes: I a matrix's inputs, O its outputs, R rank.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.config import LoraConfig, ModelConfig
from apr_jax.model.params import Params, abstract_params, init_params, logical_axes
from apr_jax.model.placement import model_shardings
from apr_jax.parallel.mesh import param_shardings

Adapters = dict[str, dict[str, jax.Array]]
Trained = Any  # Params, or the Adapters of a base

ALL_WEIGHTS = LoraConfig(rank=0, alpha=1.0, targets=())  # no adapters

TARGETS = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "o": "attention.out",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}


def abstract_trained(model: ModelConfig, lora: LoraConfig) -> Trained:
    """Return the tree that is trained with a `jax.ShapeDtypeStruct` for each array."""
    params = abstract_params(model)
    if not lora.rank:
        return params
    chosen = tuple(f".{TARGETS[target]}" for target in lora.targets)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return {
        name: {"lora_a": shape((leaf.shape[0], lora.rank)), "lora_b": shape((lora.rank, leaf.shape[1]))}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if (name := matrix_name(path)).endswith(chosen)
    }


def trained_shardings(mesh: Mesh, model: ModelConfig, lora: LoraConfig) -> Any:
    """Return a NamedSharding for each array that is trained. Adapters are small, and whole on every device."""
    trained = abstract_trained(model, lora)
    return param_shardings(mesh, trained, logical_axes(trained))


def init_trained(model: ModelConfig, lora: LoraConfig, params: Params | None, seed: int) -> Trained:
    """Return what training starts from: `params`, fresh weights where there are none, or adapters that change nothing.

    B is 0, and A uniform within 1 / sqrt(I), which is PEFT's Kaiming initialisation with a = sqrt(5).
    """
    if not lora.rank:
        return init_params(model, seed) if params is None else params
    adapters = {}
    for number, (name, pair) in enumerate(abstract_trained(model, lora).items()):
        shape_IR = pair["lora_a"].shape
        bound = 1 / math.sqrt(shape_IR[0])
        key = jax.random.fold_in(jax.random.key(seed), number)
        a_IR = jax.random.uniform(key, shape_IR, jnp.float32, -bound, bound)
        adapters[name] = {"lora_a": a_IR, "lora_b": jnp.zeros(pair["lora_b"].shape, jnp.float32)}
    return adapters


def merge(base: Params | None, trained: Trained, lora: LoraConfig) -> Params:
    """Return the policy's weights. Differentiable: of a loss of them, adapters get gradients and the base has none.

    Args:
      base: the frozen weights that adapters belong to; not read with rank 0.
    """
    if not lora.rank:
        whole: Params = trained
        return whole

    def add(path: Any, weight: jax.Array) -> jax.Array:
        pair = trained.get(matrix_name(path))
        if pair is None:
            return weight
        product_IO = jnp.matmul(pair["lora_a"], pair["lora_b"], precision=jax.lax.Precision.HIGHEST)
        return weight + lora.alpha / lora.rank * product_IO

    merged: Params = jax.tree_util.tree_map_with_path(add, base)
    return merged


def make_merge(mesh: Mesh, model: ModelConfig, lora: LoraConfig) -> Callable[[Params | None, Trained], Params]:
    """Make `merge` as a program of its own, whose result lies on the mesh as a policy does."""
    merged = functools.partial(merge, lora=lora)
    return jax.jit(merged, out_shardings=model_shardings(mesh, model)) if lora.rank else merged


def matrix_name(path: Any) -> str:
    """Return the dotted name of a policy's parameter, as `blocks.0.attention.query`."""
    return ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
