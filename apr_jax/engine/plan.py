"""An engine's sizes, checked against each other and against the devices before anything is allocated."""

import dataclasses
import functools
from typing import Self

import jax
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError, EngineConfig, ModelConfig
from apr_jax.engine.limits import Limits
from apr_jax.engine.memory import MemoryPlan, activation_bytes, group_row_bytes, with_shardings
from apr_jax.engine.sharded import PAGES
from apr_jax.kernels import DecodeKernels, for_decoding
from apr_jax.model.held_weights import HeldWeights
from apr_jax.model.paged_cache import PagedKVCache, pages_per_row


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """An engine's sizes and layouts for one model, one configuration and one mesh."""

    model: ModelConfig
    limits: Limits
    kernels: DecodeKernels
    weights: HeldWeights
    mesh: Mesh
    expects_groups: bool

    @classmethod
    def of(
        cls, model: ModelConfig, sizes: EngineConfig, mesh: Mesh, max_workers: int = 0, expects_groups: bool = True
    ) -> Self:
        """Plan an engine on a mesh. Raises ConfigError for a model that the mesh can't divide, or sizes that don't fit.

        `max_workers` may share a cache; 0: the engine runs no groups. Memory is planned for them if it expects any.
        """
        if model.num_kv_heads % mesh.shape["tensor"]:
            raise ConfigError(
                f"model.num_kv_heads={model.num_kv_heads} must be a multiple of mesh.tensor={mesh.shape['tensor']}"
            )
        kernels = for_decoding(model, sizes.decode_attention, sizes.page_size, mesh)
        limits = Limits(
            **dataclasses.asdict(sizes),
            num_shards=mesh.shape["data"],
            max_seq_len=model.max_seq_len,
            max_workers=max_workers,
        )
        if expects_groups:
            limits.check_group(max_workers, max_workers * -(-model.max_seq_len // sizes.page_size))
        weights = HeldWeights.of(model, kernels.ops, kernels.own_head)
        plan = cls(model, limits, kernels, weights, mesh, expects_groups)
        plan.memory.check()
        return plan

    def pages(self) -> PagedKVCache:
        """Return an empty cache; jit it with `cache_sharding`."""
        limits = self.limits
        return PagedKVCache.create(
            self.model, limits.num_shards, limits.pages, limits.page_size, self.kernels.attention.tile
        )

    @property
    def cache_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PAGES)

    @functools.cached_property
    def memory(self) -> MemoryPlan:
        """The memory that the engine will take on each device."""
        model, mesh, limits = self.model, self.mesh, self.limits
        pages = with_shardings(jax.eval_shape(self.pages), self.cache_sharding)
        prefill_tokens = limits.prefill_lanes * limits.page_size
        row, tensor = pages_per_row(model.max_seq_len, limits.page_size) * limits.page_size, mesh.shape["tensor"]
        workers = limits.max_groups * limits.max_workers if self.expects_groups else 0
        return MemoryPlan.of(
            mesh,
            weights=with_shardings(self.weights.abstract(), self.weights.shardings(mesh)),
            pages=pages,
            activations=group_row_bytes(model, workers, row, tensor)
            + activation_bytes(model, limits.lanes, prefill_tokens, tensor),
        )
