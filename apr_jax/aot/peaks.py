"""The peaks of accelerators, from their makers' pages, and the least time that a program can take on them.

The roofline model (Williams, Waterman and Patterson 2009) with a third limit, the links between devices: a program
takes at least the longest of its time to compute, to move bytes to and from memory, and to send bytes to other devices.
Real programs take longer: nothing reaches its peak, and the three don't overlap wholly. `bench/roofline.py` measures
the limits of a machine that is there.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """One device."""

    flops: float  # floating-point operations a second on dense bfloat16 matrices
    memory: int  # bytes
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that it can send to others: half of the published, both directions' figure
    source: str


PEAKS: dict[str, Peaks] = {
    "v5e": Peaks(
        flops=197e12,
        memory=16 * 2**30,
        memory_bandwidth=819e9,
        link_bandwidth=400e9 / 2,
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Peaks(
        flops=459e12,
        memory=95 * 2**30,
        memory_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2,
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    "h100": Peaks(  # SXM, 80 GB; the datasheet's 1,979 TFLOPS are with sparsity
        flops=989.4e12,
        memory=80 * 10**9,
        memory_bandwidth=3.35e12,
        link_bandwidth=900e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
}


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
