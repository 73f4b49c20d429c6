"""The weights of a decoder as a tree: fresh ones, their shapes, their number, and the logical axes of each."""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.model.llama import Llama
from apr_jax.model.ops import XLA, Ops
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import partition_spec

Params = nnx.State[Any, Any]  # the weights as a pytree; its keys are the attributes of the modules

_LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "scale": (None,),
    "query_bias": ("heads",),
    "key_bias": ("kv_heads",),
    "value_bias": ("kv_heads",),
    "query": ("embed", "heads"),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "out": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "lora_a": (None, None),
    "lora_b": (None, None),
}


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """Parameters of a model. The embedding share is the token embedding and, when untied, the output head."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        """Add up both shares."""
        return self.embedding + self.non_embedding


def init_params(config: ModelConfig, seed: int) -> Params:
    """Draw fresh float32 weights: norms are one, matrices normal with standard deviation 0.02 (see `llama.py`)."""
    return nnx.state(Llama(config, rngs=nnx.Rngs(seed)))  # not jitted: XLA compiles a draw per shape, not per matrix


def with_new_ids(params: Params, known: int, vocab_size: int) -> Params:
    """Return weights for `vocab_size` ids, whose embeddings from the id `known` on are the mean of those before it."""

    def renew(path: Any, leaf: jax.Array) -> jax.Array:
        axes = _LOGICAL_AXES[name_of(path)]
        if "vocab" not in axes:
            return leaf
        axis = axes.index("vocab")
        old = jax.lax.slice_in_dim(leaf, 0, known, axis=axis)
        mean = jnp.mean(old, axis=axis, keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
        return jnp.concatenate([old, jnp.repeat(mean, vocab_size - known, axis=axis)], axis=axis)

    return jax.tree_util.tree_map_with_path(renew, params)


def graphdef(config: ModelConfig, ops: Ops = XLA) -> nnx.GraphDef[Llama]:
    """Build the model's structure without weights; `nnx.merge(graphdef(config), params)` is a model."""
    return nnx.split(_abstract(config, ops))[0]


def abstract_params(config: ModelConfig) -> Params:
    """Return the params' tree with a `jax.ShapeDtypeStruct` for each array."""
    return jax.tree.map(lambda x: x, _shapes(config))  # a tree of the caller's own


@functools.lru_cache(maxsize=8)  # it takes seconds for many layers
def _shapes(config: ModelConfig) -> Params:
    return nnx.split(_abstract(config, XLA))[1]


def logical_axes(params: Params) -> Params:
    """Return the same tree with a `PartitionSpec` of logical axis names for each array (see `parallel.mesh`).

    Raises KeyError for a parameter that has none: a new one must be given its axes here.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: partition_spec(*_LOGICAL_AXES[name_of(path)]), params)


@functools.cache
def num_params(config: ModelConfig) -> ParamCount:
    """Count parameters without allocating them."""
    sizes = {"embedding": 0, "non_embedding": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        sizes["embedding" if name_of(path) in ("embedding", "head") else "non_embedding"] += math.prod(leaf.shape)
    return ParamCount(**sizes)


def name_of(path: Any) -> str:
    """Return the attribute under which a parameter hangs in its module."""
    return next(str(entry.key) for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))


def _abstract(config: ModelConfig, ops: Ops) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, ops, rngs=nnx.Rngs(0)))


def weights_digest(params: Params) -> str:
    """Return sixteen hex digits that stand for all arrays and their names. All hosts of a job call it."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(hosts.whole_array(leaf) if isinstance(leaf, jax.Array) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
