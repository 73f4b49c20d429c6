"""The lanes and pages that a device's memory allows, where the configuration leaves them to the devices (-1).

Pages fill a share of the memory that is left beside the weights and whatever else lies on the device. There is a lane
for every quarter of a context that they hold, because threads stop long before their context is full, and waiting
parents keep pages without a lane.
"""

import dataclasses
from collections.abc import Callable

from apr_jax.config import ConfigError, EngineConfig
from apr_jax.config_fields import BY_DEVICES

ALONE, BESIDE_A_TRAINER = 0.9, 0.5  # shares of what is left; a trainer needs the other half for its activations
ON_A_CPU = 0.25  # of the memory that all programs of the machine share
_MOST_LANES = {"cpu": 64}
_MOST_LANES_ELSEWHERE = 256  # beyond these a step takes longer, and rollouts of a batch end at different times
_CONTEXTS_A_THREAD = 4  # contexts in which a lane expects one full one's pages


@dataclasses.dataclass(frozen=True)
class Room:
    """The memory of a device for an engine's pages and activations."""

    bytes: int
    page: int  # bytes of one
    activations: Callable[[int], int]  # bytes, of a number of lanes
    most_lanes: int

    @classmethod
    def of(cls, platform: str, left: int, share: float, page: int, activations: Callable[[int], int]) -> "Room":
        """Take a share of the `left` bytes, or the CPU's share if that is smaller."""
        share = min(share, ON_A_CPU) if platform == "cpu" else share
        return cls(int(share * left), page, activations, _MOST_LANES.get(platform, _MOST_LANES_ELSEWHERE))

    def fill(self, sizes: EngineConfig, thread_pages: int, least_pages: int, least_lanes: int) -> EngineConfig:
        """Return the sizes with the lanes and pages that fit, in place of those that are left to the devices.

        Args:
            thread_pages: of a thread whose context is full.
            least_pages, least_lanes: that there must be, beside the reserved page.
        Raises ConfigError where not even one full thread fits.
        """
        for lanes in self._lanes(least_lanes) if sizes.lanes == BY_DEVICES else [sizes.lanes]:
            wanted = lanes * -(-thread_pages // _CONTEXTS_A_THREAD) if sizes.lanes == BY_DEVICES else 0
            pages = sizes.pages
            if pages == BY_DEVICES:
                pages = min(
                    (self.bytes - self.activations(lanes)) // self.page, max(lanes * thread_pages, least_pages) + 1
                )
            if pages > max(wanted, least_pages):
                return dataclasses.replace(sizes, lanes=lanes, pages=pages)
        raise ConfigError(
            f"engine.lanes={sizes.lanes} and engine.pages={sizes.pages}: {self.bytes / 1e9:.2f} GB of a device are "
            f"left for them, and full threads take at least {(least_pages + 1) * self.page / 1e9:.2f} GB; split the "
            "model over mesh.tensor or mesh.fsdp, or lower model.max_seq_len"
        )

    def _lanes(self, least: int) -> list[int]:
        """Return the numbers of lanes to try, eights as long as there are so many, the largest first."""
        tried = [*range(self.most_lanes, 8, -8), *range(8, 0, -1)]
        return [lanes for lanes in tried if lanes >= least] or [least]
