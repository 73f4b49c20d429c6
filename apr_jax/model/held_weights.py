"""The weights as a decode step wants them: made once per policy, on the device, from the trainer's.

A decode step multiplies a few rows by every matrix, so how a matrix lies in memory decides how fast that is, and the
time to read it is most of the step on an accelerator. So matrices are in the compute dtype (a cast at each step would
read the float32 ones), and lie as the `Ops` want them. docs/decode.md has the study.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ModelConfig
from apr_jax.model.llama import Llama
from apr_jax.model.ops import Ops
from apr_jax.model.params import Params, abstract_params, graphdef, logical_axes, name_of
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import RULES

_Keys = tuple[Any, ...]
_WHOLE_OVER_FSDP = dataclasses.replace(RULES, embed=None)  # a split would make each step gather the weights


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
        """Return the trainer's weights as they are held. Pure."""
        given = _by_keys(params)

        def make(path: Any, _: jax.ShapeDtypeStruct) -> jax.Array:
            source, making = self._making(path, given)
            return making(given[source])

        return jax.tree_util.tree_map_with_path(make, abstract_params(self.config))

    def take(self, params: Params, mesh: Mesh, old: Params | None = None) -> Params:
        """Bring the trainer's weights to an engine's mesh, array by array, from wherever they lie.

        Each array of `old`, which is held likewise, is deleted before its successor is made. So the devices never hold
        two copies, nor whole float32 weights of a trainer that splits them. All hosts of a job call it.
        """
        given, axes = _by_keys(params), _by_keys(logical_axes(params))

        def make(path: Any, place: NamedSharding, *before: jax.Array) -> jax.Array:
            for array in before:
                array.delete()
            source, making = self._making(path, given)
            there = NamedSharding(mesh, _WHOLE_OVER_FSDP.spec(tuple(axes[source])))
            return _jitted(making, place)(_bring(given[source], there, making.dtype))

        return jax.tree_util.tree_map_with_path(make, self.shardings(mesh), *(() if old is None else (old,)))

    def _making(self, path: Any, given: Mapping[_Keys, Any]) -> tuple[_Keys, "_Making"]:
        """Return the keys of the array that a held one is made of, and how: a head may be the embedding, transposed."""
        keys = _keys(path)
        source = keys if keys in given else ("embedding",)
        dtype = self.config.compute_dtype if given[source].ndim > 1 else "float32"
        return source, _Making(self.ops, dtype, name_of(path) == "embedding", source != keys)

    def abstract(self) -> Params:
        """Return the held weights' tree with a `jax.ShapeDtypeStruct` for each array."""
        return jax.eval_shape(self.hold, abstract_params(self.config))

    def shardings(self, mesh: Mesh) -> Params:
        """Place the held weights: split over "tensor" where they lie as trained, and whole otherwise."""
        axes = logical_axes(abstract_params(self.config))

        def sharding(logical: PartitionSpec, held: jax.ShapeDtypeStruct) -> NamedSharding:
            return NamedSharding(mesh, _WHOLE_OVER_FSDP.spec(tuple(logical) if held.ndim == len(logical) else ()))

        return jax.tree.map(sharding, axes, self.abstract())

    def num_bytes(self) -> int:
        """Count the bytes that one decode step reads whole: all but an embedding that it looks rows up in."""
        tied = self.config.tie_embeddings
        leaves = jax.tree_util.tree_leaves_with_path(self.abstract())
        read = [leaf for path, leaf in leaves if tied or name_of(path) != "embedding"]
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in read)


@dataclasses.dataclass(frozen=True)
class _Making:
    """The way from a trained array to a held one. Hashable, so that it is compiled once."""

    ops: Ops
    dtype: str
    is_looked_up: bool
    is_transposed: bool

    def __call__(self, given: jax.Array) -> jax.Array:
        if given.ndim == 1:
            return given
        matrix = (given.T if self.is_transposed else given).astype(self.dtype)
        return matrix if self.is_looked_up else self.ops.hold(matrix)


@functools.cache
def _jitted(making: _Making, place: NamedSharding) -> Any:
    return jax.jit(making.__call__, out_shardings=place)


def _bring(array: Any, there: NamedSharding, dtype: str) -> Any:
    """Return an array on the devices of `there`, as it is if it lies on them in whatever way."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return hosts.bring_home(array, there.spec, dtype)
    is_there = isinstance(array, jax.Array) and set(array.devices()) == set(there.mesh.devices.flat)
    return array if is_there else jax.device_put(array, there)


def _by_keys(tree: Params) -> dict[_Keys, Any]:
    return {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _keys(path: Any) -> _Keys:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
