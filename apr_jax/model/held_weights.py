"""The weights as a decode step wants them: made once per policy, on the device, from the trainer's.

A decode step multiplies a few rows by every matrix, so how a matrix lies in memory decides how fast that is, and the
time to read it is most of the step on an accelerator. So matrices are in the compute dtype (a cast at each step would
read the float32 ones), and lie as the `Ops` want them. docs/decode.md has the study.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ModelConfig
from apr_jax.model.llama import Llama
from apr_jax.model.ops import Ops
from apr_jax.model.params import Params, abstract_params, graphdef, logical_axes, name_of
from apr_jax.parallel.mesh import RULES


@dataclasses.dataclass(frozen=True)
class HeldWeights:
    """A model for decoding, and how its weights are held."""

    config: ModelConfig  # nothing is rematerialised; untied where the head is held apart from the embedding
    ops: Ops

    @classmethod
    def of(cls, config: ModelConfig, ops: Ops, own_head: bool) -> "HeldWeights":
        """Plan for a trained model; with `own_head` a head tied to the embedding is a matrix of its own."""
        tied = config.tie_embeddings and not own_head
        return cls(dataclasses.replace(config, remat="none", tie_embeddings=tied), ops)

    def graphdef(self) -> nnx.GraphDef[Llama]:
        """Return the structure of the model that reads these weights."""
        return graphdef(self.config, self.ops)

    def hold(self, params: Params) -> Params:
        """Return the trainer's weights as they are held. Pure; jit it with `shardings`."""
        given = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

        def make(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            name, keys = name_of(path), _keys(path)
            made = given[("embedding",)].T if keys not in given else given[keys]
            assert made.shape == wanted.shape, f"{name}: {made.shape} is not {wanted.shape}"
            if made.ndim == 1:
                return made
            made = made.astype(self.config.compute_dtype)
            return made if name == "embedding" else self.ops.hold(made)

        return jax.tree_util.tree_map_with_path(make, abstract_params(self.config))

    def abstract(self) -> Params:
        """Return the held weights' tree with a `jax.ShapeDtypeStruct` for each array."""
        return jax.eval_shape(self.hold, abstract_params(self.config))

    def shardings(self, mesh: Mesh) -> Params:
        """Place the held weights: split over "tensor" where they lie as trained, and whole otherwise.

        A split over another axis would make each step gather them.
        """
        rules = dataclasses.replace(RULES, embed=None)
        axes = logical_axes(abstract_params(self.config))

        def sharding(logical: PartitionSpec, held: jax.ShapeDtypeStruct) -> NamedSharding:
            return NamedSharding(mesh, rules.spec(tuple(logical) if held.ndim == len(logical) else ()))

        return jax.tree.map(sharding, axes, self.abstract())

    def num_bytes(self) -> int:
        """Count the bytes that one decode step reads whole: all but an embedding that it looks rows up in."""
        tied = self.config.tie_embeddings
        leaves = jax.tree_util.tree_leaves_with_path(self.abstract())
        read = [leaf for path, leaf in leaves if tied or name_of(path) != "embedding"]
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in read)


def _keys(path: Any) -> tuple[Any, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
