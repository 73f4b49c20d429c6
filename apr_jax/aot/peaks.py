"""The least time that a program can take on an accelerator.

The roofline model (Williams, Waterman and Patterson 2009) with a third limit, the links between devices: a program
takes at least the longest of its time to compute, to move bytes to and from memory, and to send bytes to other devices.
Real programs take longer: nothing reaches its peak (`bench/datasheets.py`), and the three don't overlap wholly.
"""

import dataclasses

from apr_jax.bench.datasheets import Peaks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The work of one device in one program."""

    flops: float
    bytes: float  # read from and written to its memory
    sent: float  # bytes that it sends to other devices

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes, sent=self.sent + other.sent)

    def __mul__(self, times: float) -> "Cost":
        return Cost(flops=self.flops * times, bytes=self.bytes * times, sent=self.sent * times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The least seconds that each limit leaves."""

    compute: float
    memory: float
    links: float

    @classmethod
    def of(cls, cost: Cost, peaks: Peaks) -> "Estimate":
        return cls(
            compute=cost.flops / peaks.flops,
            memory=cost.bytes / peaks.memory_bandwidth,
            links=cost.sent / peaks.link_bandwidth,
        )

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """The limit that is met first: "compute", "memory" or "links"."""
        return max(("compute", "memory", "links"), key=lambda name: float(getattr(self, name)))
