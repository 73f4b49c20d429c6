"""Recomputation of layers and logits in backward passes, to save memory.

`model.remat="auto"` chooses it: on accelerators the least that fits a device's memory. On a CPU layers are recomputed.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.config import ModelConfig
from apr_jax.model.params import num_params
from apr_jax.parallel import hosts
from apr_jax.parallel.device_memory import memory_limit
from apr_jax.parallel.mesh import FSDP_AXIS, TENSOR_AXIS, row_shards

# Logits that a device holds at a time, in elements, where chunks are recomputed. A CPU's caches want small ones.
# Elsewhere each one casts the head again and rewrites its gradient, so they are large: 512 MiB in float32.
ON_CPU, CHUNK = 1 << 24, 1 << 27
_LOGITS_BYTES = 9  # of each at a time: float32, its gradient, and what is between them
_GB = 1e9


Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """The part of the layers that is recomputed, as `model.remat` says it, and the logits held at a time."""

    remat: Remat
    max_logits: int

    @classmethod
    def of(cls, model: ModelConfig, mesh: Mesh) -> Self:
        """Return what the configuration says, without a look at memory: "auto" recomputes all that can be."""
        chunk = ON_CPU if mesh.devices.flat[0].platform == "cpu" else CHUNK
        return cls("full" if model.remat == "auto" else model.remat, chunk)

    @classmethod
    def fitting(cls, model: ModelConfig, mesh: Mesh, tokens: int, held: Callable[[], int]) -> Self:
        """Return what `model.remat` says; for "auto" on an accelerator the least that fits its memory, and tell it.

        Args:
            model: the policy.
            mesh: the devices.
            tokens: of a microbatch, on all devices together.
            held: returns the bytes that are taken on each device.
        """
        given = cls.of(model, mesh)
        if model.remat != "auto" or mesh.devices.flat[0].platform == "cpu":
            return given
        tokens = -(-tokens // row_shards(mesh))
        logits, limit = tokens * model.vocab_size, memory_limit(mesh)
        fsdp, tensor = mesh.shape[FSDP_AXIS], mesh.shape[TENSOR_AXIS]
        every = [cls("none", max(CHUNK, logits)), cls("none", CHUNK), cls("dots", CHUNK), given]
        taken = held()
        needed = [taken + pass_bytes(model, tokens, fsdp, tensor, each) for each in every]
        place = next((i for i, size in enumerate(needed) if limit and size <= limit), len(every) - 1)
        print(
            f"a microbatch of {tokens:,} tokens a device: model.remat={every[place].remat!r}, "
            f"{min(every[place].max_logits, logits):,} logits at a time; about {needed[place] / _GB:.1f} GB"
            + (f" of {limit / _GB:.1f} GB" if limit else ""),
            file=hosts.messages(),
        )
        return every[place]


def pass_bytes(model: ModelConfig, tokens: int, fsdp: int, tensor: int, recomputed: Recomputation) -> int:
    """Estimate what a pass over `tokens` tokens of a device keeps for its backward pass, and its widest moment.

    The layers' weights that it gathers over fsdp are in it where layers are not recomputed: then they are kept, too.
    """
    D, heads, F = model.embed_dim, (model.num_heads + model.num_kv_heads) * model.head_dim, model.mlp_dim
    layer = 4 * D + (2 * heads + 3 * F) // tensor  # the stream twice, two norms; products of attention and MLP
    kept = {"none": layer, "dots": 3 * D + (2 * heads + 2 * F) // tensor, "full": D}[recomputed.remat]
    size = jnp.dtype(model.compute_dtype).itemsize
    logits = _LOGITS_BYTES * min(tokens * model.vocab_size, recomputed.max_logits)
    gathered = num_params(model).non_embedding // tensor * size if fsdp > 1 and recomputed.remat != "full" else 0
    return int(tokens * size * (kept * model.num_layers * 1.1 + 3 * layer) + logits) + gathered
