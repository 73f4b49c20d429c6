"""The memory that an engine will take on each device, told and checked before anything is allocated."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError, ModelConfig
from apr_jax.parallel.device_memory import local_bytes, memory_limit

_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device of the mesh."""

    weights: int  # in decode's layout
    pages: int
    activations: int  # an estimate: all lanes' logits or a prefill call's widest layer, and groups' gathered rows
    beside: int  # what else is on the device: the trainer's state, gradients and reference, or the weights given
    limit: int | None  # what the device has; None where it does not say

    @classmethod
    def of(cls, mesh: Mesh, *, weights: Any, pages: Any, activations: int, beside: int) -> Self:
        """Make a plan; `weights` and `pages` are trees of `jax.ShapeDtypeStruct` with shardings."""
        parts = {"weights": local_bytes(weights), "pages": local_bytes(pages)}
        return cls(**parts, activations=activations, beside=beside, limit=memory_limit(mesh))

    @property
    def total(self) -> int:
        return self.weights + self.pages + self.activations + self.beside

    def check(self) -> None:
        """Raise ConfigError, with the numbers, when it is more than a device has."""
        if self.limit is not None and self.total > self.limit:
            raise ConfigError(
                f"the engine does not fit a device: {self}; lower engine.pages or engine.lanes, or split the "
                "model over mesh.tensor"
            )

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name) / _GB:.2f}" for name in ("weights", "pages", "activations", "beside")]
        available = "" if self.limit is None else f" of {self.limit / _GB:.1f} GB"
        return f"{self.total / _GB:.2f} GB a device{available} ({', '.join(parts)})"


def activation_bytes(model: ModelConfig, lanes: int, prefill_tokens: int, tensor: int) -> int:
    """Return the larger of decode's logits (raw, masked, exponentials) and a prefill call's widest layer, in float32.

    Args:
        lanes: of a data shard.
        prefill_tokens: that a data shard computes in one call.
        tensor: devices that split heads and the MLP.
    """
    logits = 3 * lanes * model.vocab_size
    layer = prefill_tokens * (4 * model.embed_dim + 3 * model.mlp_dim // tensor)
    return 4 * max(logits, layer)


def group_row_bytes(model: ModelConfig, lanes: int, row_len: int, tensor: int) -> int:
    """Return the bytes of the rows that decode on shared caches gathers for `lanes` workers of a data shard."""
    elements = 2 * model.num_layers * lanes * row_len * model.num_kv_heads * model.head_dim // tensor
    return elements * jnp.dtype(model.compute_dtype).itemsize


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Return the tree of shapes with shardings: a tree of them, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    shape: Callable[..., Any] = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x, at: shape(x.shape, x.dtype, sharding=at), shapes, shardings)
