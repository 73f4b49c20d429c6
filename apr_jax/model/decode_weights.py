"""The weights as a decode step wants them: made once per policy, on the device, from the trainer's.

A decode step multiplies a few rows by every matrix, so how a matrix lies in memory decides how fast that is, and the
time to read it is most of the step on an accelerator. Here matrices are in the compute dtype (a cast at each step would
read the float32 ones), query, key and value are one product, and so are gate and up. docs/decode.md has the study.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ModelConfig
from apr_jax.model import native
from apr_jax.model.llama import Matrices, Params, WeightLayout, abstract_params, logical_axes
from apr_jax.parallel.mesh import RULES, TENSOR_AXIS

# From this width on XLA's CPU backend multiplies `[out, in] x [in, lanes]` faster than `[lanes, in] x [in, out]`.
MIN_TRANSPOSED_DIM = 512

_ARRANGED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "plain": lambda matrix_DF: matrix_DF,
    "transposed": jnp.transpose,
    "panels": native.to_panels,
    "paired_panels": functools.partial(native.to_panels, paired=True),
}
_FUSED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}


def choose_layout(config: ModelConfig, mesh: Mesh, with_kernels: bool = False) -> WeightLayout:
    """The layout that measured fastest on the mesh's kind of device.

    Fused matrices are not split over "tensor", since their parts would have to be split each; and the compiler can't
    split a kernel. `with_kernels`: the mesh is of CPUs, and the kernels of `native.py` are wanted.
    """
    on_cpu, whole = mesh.devices.flat[0].platform == "cpu", mesh.shape[TENSOR_AXIS] == 1
    matrices: Matrices = "plain"
    if with_kernels and whole:
        matrices = "panels" if config.compute_dtype == "float32" else "paired_panels"
    elif on_cpu and config.embed_dim >= MIN_TRANSPOSED_DIM:
        matrices = "transposed"
    return WeightLayout(fused=whole, matrices=matrices, own_head=on_cpu)


def to_layout(params: Params, config: ModelConfig, layout: WeightLayout) -> Params:
    """The trainer's weights in another layout, matrices in the compute dtype. Pure; jit it with `layout_shardings`."""
    given = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def make(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        *parents, name = _keys(path)
        if name == "head" and (name,) not in given:
            made = given[("embedding",)].T
        else:
            parts = _FUSED.get(name, (name,)) if layout.fused else (name,)
            made = jnp.concatenate([given[(*parents, part)] for part in parts], axis=-1)
        if made.ndim == 1:
            return made
        if name != "embedding":
            made = _ARRANGED[layout.matrices](made)
        assert made.shape == wanted.shape, f"{name}: {made.shape} is not {wanted.shape}"
        return made.astype(config.compute_dtype)

    return jax.tree_util.tree_map_with_path(make, abstract_params(config, layout))


def layout_shardings(mesh: Mesh, config: ModelConfig, layout: WeightLayout) -> Params:
    """Where `to_layout`'s weights lie: split over "tensor" and whole elsewhere, or each step would gather them."""
    rules = dataclasses.replace(RULES, embed=None)

    def sharding(path: Any, logical: PartitionSpec) -> NamedSharding:
        axes = tuple(logical)
        if len(axes) == 2 and _keys(path)[-1] != "embedding" and layout.matrices != "plain":
            axes = axes[::-1] if layout.matrices == "transposed" else ()
        return NamedSharding(mesh, rules.spec(axes))

    params = abstract_params(config, layout)
    return jax.tree_util.tree_map_with_path(sharding, logical_axes(params))


def num_bytes(config: ModelConfig, layout: WeightLayout) -> int:
    """Bytes of the weights that one decode step reads whole: all but an embedding that it looks rows up in."""
    size = jnp.dtype(config.compute_dtype).itemsize
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config, layout))
    tied = config.tie_embeddings and not layout.own_head
    read = [leaf for path, leaf in leaves if tied or _keys(path)[-1] != "embedding"]
    return sum(math.prod(leaf.shape) * (size if leaf.ndim > 1 else 4) for leaf in read)


def _keys(path: Any) -> tuple[Any, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
