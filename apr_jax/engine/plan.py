"""An engine's sizes, checked against each other and against the devices before anything is allocated."""

import dataclasses
import functools
from typing import Self

import jax
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError, ModelConfig, RolloutConfig
from apr_jax.engine.decode_cache import DecodePlan
from apr_jax.engine.memory import MemoryPlan, activation_bytes, shared_row_bytes, with_shardings
from apr_jax.engine.scheduler import Limits
from apr_jax.engine.sharded import PAGES
from apr_jax.model.decode_weights import choose_layout, layout_shardings, to_layout
from apr_jax.model.kv_cache import PagedKVCache, RowBuffers
from apr_jax.model.llama import WeightLayout, abstract_params


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """What an engine of this model, these rollouts and this mesh will be."""

    model: ModelConfig
    limits: Limits
    decode: DecodePlan
    weights: WeightLayout
    mesh: Mesh
    expects_groups: bool

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        rollout: RolloutConfig,
        mesh: Mesh,
        max_workers: int = 0,
        expects_groups: bool = True,
    ) -> Self:
        """Raises ConfigError for sizes that don't divide over the mesh, or don't fit a device.

        `max_workers` may share a cache; 0: the engine runs no groups. Memory is planned for them if it expects any.
        """
        shards = mesh.shape["data"]
        for name in ("num_lanes", "num_pages", "prefill_lanes"):
            if getattr(rollout, name) % shards:
                raise ConfigError(f"rollout.{name}={getattr(rollout, name)} must be a multiple of mesh.data={shards}")
        if model.num_kv_heads % mesh.shape["tensor"]:
            raise ConfigError(
                f"model.num_kv_heads={model.num_kv_heads} must be a multiple of mesh.tensor={mesh.shape['tensor']}"
            )
        lanes, pages = rollout.num_lanes // shards, rollout.num_pages // shards
        decode = DecodePlan.of(model, rollout.decode_attention, rollout.page_size, mesh)
        limits = Limits(
            num_shards=shards,
            lanes=lanes,
            pages=pages,
            page_size=rollout.page_size,
            max_seq_len=model.max_seq_len,
            steps_per_visit=rollout.steps_per_visit,
            prefill_lanes=rollout.prefill_lanes // shards,
            prefix_reuse=rollout.prefix_reuse,
            block_size=decode.layout.block_size,
            row_blocks=decode.row_blocks(lanes, pages),
            max_workers=max_workers,
        )
        needed = max_workers * -(-model.max_seq_len // rollout.page_size)
        if expects_groups and needed > limits.pages - 1:
            raise ConfigError(
                f"{max_workers} workers on a shared cache may need {needed} pages of rollout.page_size="
                f"{rollout.page_size}, and a data shard has {limits.pages - 1} usable ones; raise rollout.num_pages"
            )
        plan = cls(model, limits, decode, choose_layout(model, mesh, decode.impl == "cpu"), mesh, expects_groups)
        plan.memory.check()
        return plan

    def caches(self) -> tuple[PagedKVCache, RowBuffers]:
        """An empty cache and empty buffers; jit it with `cache_sharding`."""
        limits = self.limits
        pages = PagedKVCache.create(
            self.model, limits.num_shards, limits.pages, limits.page_size, self.decode.layout.tile
        )
        return pages, self.decode.buffers(self.model, limits.num_shards, limits.row_blocks, limits.lanes)

    @property
    def cache_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PAGES)

    @functools.cached_property
    def memory(self) -> MemoryPlan:
        """What the engine will hold on each device."""
        model, mesh, limits = self.model, self.mesh, self.limits
        pages, rows = with_shardings(jax.eval_shape(self.caches), self.cache_sharding)
        weights = jax.eval_shape(lambda params: to_layout(params, model, self.weights), abstract_params(model))
        prefill_tokens = limits.prefill_lanes * limits.page_size
        layout, tensor = self.decode.layout, mesh.shape["tensor"]
        workers = limits.max_groups * limits.max_workers if self.expects_groups else 0
        shared = shared_row_bytes(model, workers, layout.num_blocks * layout.block_size, tensor)
        return MemoryPlan.of(
            mesh,
            weights=with_shardings(weights, layout_shardings(mesh, model, self.weights)),
            pages=pages,
            rows=rows,
            activations=shared + activation_bytes(model, limits.lanes, prefill_tokens, tensor),
        )
