"""An engine's sizes, checked against each other and against the devices before anything is allocated."""

import dataclasses
import functools
from typing import Self

import jax
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ConfigError, EngineConfig, ModelConfig
from apr_jax.config_fields import BY_DEVICES
from apr_jax.engine.limits import Limits
from apr_jax.engine.memory import MemoryPlan, activation_bytes, group_row_bytes, with_shardings
from apr_jax.engine.sharded import PAGES
from apr_jax.engine.sizes import ALONE, Room
from apr_jax.kernels import DecodeKernels, for_decoding
from apr_jax.model.held_weights import HeldWeights
from apr_jax.model.paged_cache import PagedKVCache, pages_per_row

_HOST_SECONDS = 38e-6  # of a visit, for each lane of all shards
# A step takes at least, however few its lanes: seconds for each layer, and its weights' bytes at so many a second.
_LEAST_STEP = {"cpu": (1.5e-5, 6e10)}
_LEAST_STEP_ELSEWHERE = (2e-5, 1e12)


def choose_halves(platform: str, num_layers: int, limits: Limits, weights: int) -> int:
    """Return 2 where halves in turn hide more of the host's work than they cost; `weights` are a device's bytes.

    Each half takes steps of its own, and reads the weights in them.
    """
    if limits.max_workers:
        return 1
    layer_seconds, bytes_a_second = _LEAST_STEP.get(platform, _LEAST_STEP_ELSEWHERE)
    hidden = _HOST_SECONDS * limits.num_shards * limits.lanes
    cost = limits.steps_per_visit * (num_layers * layer_seconds + weights / bytes_a_second)
    return 2 if hidden > cost else 1


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """An engine's sizes and layouts for one model, one configuration and one mesh."""

    model: ModelConfig
    limits: Limits
    kernels: DecodeKernels
    weights: HeldWeights
    mesh: Mesh
    expects_groups: bool
    beside: int

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        sizes: EngineConfig,
        mesh: Mesh,
        max_workers: int = 0,
        expects_groups: bool = True,
        *,
        beside: int = 0,
        share: float = ALONE,
    ) -> Self:
        """Plan an engine on a mesh. Sizes that are left to the devices become numbers (`sizes.Room`).

        Args:
            max_workers: how many may share a cache; 0: the engine runs no groups.
            expects_groups: memory is planned for groups.
            beside: bytes of what else lies on each device.
            share: of the memory that is left beside all that, for such sizes.

        Raises ConfigError for a model that the mesh can't divide, or sizes that don't fit.
        """
        if model.num_kv_heads % mesh.shape["tensor"]:
            raise ConfigError(
                f"model.num_kv_heads={model.num_kv_heads} must be a multiple of mesh.tensor={mesh.shape['tensor']}"
            )
        kernels = for_decoding(model, sizes, mesh)
        weights = HeldWeights.of(model, kernels.ops, kernels.own_head)

        def limits(sizes: EngineConfig) -> Limits:
            return Limits(
                **dataclasses.asdict(sizes),
                num_shards=mesh.shape["data"],
                max_seq_len=model.max_seq_len,
                max_workers=max_workers,
            )

        thread_pages = -(-model.max_seq_len // sizes.page_size)
        if BY_DEVICES in (sizes.lanes, sizes.pages):
            least, group_pages = max(1, max_workers), max(1, max_workers * expects_groups) * thread_pages
            smallest = limits(dataclasses.replace(sizes, lanes=least, pages=group_pages + 1))
            room = cls(model, smallest, kernels, weights, mesh, expects_groups, beside)._room(share)
            sizes = room.fill(sizes, thread_pages, group_pages, least)
        plan = cls(model, limits(sizes), kernels, weights, mesh, expects_groups, beside)
        halves = choose_halves(mesh.devices.flat[0].platform, model.num_layers, plan.limits, plan.memory.weights)
        plan = dataclasses.replace(plan, limits=dataclasses.replace(plan.limits, halves=halves))
        if expects_groups:
            plan.limits.check_group(max_workers, max_workers * thread_pages)
        plan.memory.check()
        return plan

    @property
    def sizes(self) -> EngineConfig:
        """The configuration's section, in numbers."""
        return EngineConfig(**{each.name: getattr(self.limits, each.name) for each in dataclasses.fields(EngineConfig)})

    def _room(self, share: float) -> Room:
        """Return the memory that pages and activations of an engine like this one can have.

        Raises ConfigError for a device that does not say how much memory it has.
        """
        memory = self.memory
        if memory.limit is None:
            raise ConfigError(
                "engine.lanes=-1 and engine.pages=-1 follow a device's memory, which this one does not tell; set both"
            )
        left = memory.limit - memory.weights - memory.beside
        platform, page = self.mesh.devices.flat[0].platform, memory.pages // self.limits.pages
        return Room.of(platform, left, share, page, self._activations)

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
        return MemoryPlan.of(
            self.mesh,
            weights=with_shardings(self.weights.abstract(), self.weights.shardings(self.mesh)),
            pages=with_shardings(jax.eval_shape(self.pages), self.cache_sharding),
            activations=self._activations(self.limits.lanes),
            beside=self.beside,
        )

    def _activations(self, lanes: int) -> int:
        model, limits, tensor = self.model, self.limits, self.mesh.shape["tensor"]
        row = pages_per_row(model.max_seq_len, limits.page_size) * limits.page_size
        groups = lanes // limits.max_workers if self.expects_groups and limits.max_workers else 0
        prefill_tokens = limits.prefill_lanes * limits.page_size
        return group_row_bytes(model, groups * limits.max_workers, row, tensor) + activation_bytes(
            model, lanes, prefill_tokens, tensor
        )
