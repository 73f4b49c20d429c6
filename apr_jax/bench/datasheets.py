"""The peaks of accelerators, from their makers' pages.

Nothing reaches its peak. `bench/roofline.py` measures the limits of a machine that is there.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """One device, as JAX counts them."""

    kinds: tuple[str, ...] = ()  # what JAX calls it (`device_kind`)
    flops: float  # floating-point operations a second on dense bfloat16 matrices
    memory: int  # bytes
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that it can send to others: half of the published, both directions' figure
    source: str


# NVIDIA's pages give FLOPs with sparsity, which are twice those of dense matrices.
PEAKS: dict[str, Peaks] = {
    "v4": Peaks(  # six links of 50 GB/s each way
        kinds=("TPU v4",),
        flops=275e12,
        memory=32 * 2**30,
        memory_bandwidth=1200e9,
        link_bandwidth=300e9,
        source="https://arxiv.org/abs/2304.01433 (table 4)",
    ),
    "v5e": Peaks(
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        memory=16 * 2**30,
        memory_bandwidth=819e9,
        link_bandwidth=400e9 / 2,
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Peaks(
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        memory=95 * 2**30,
        memory_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2,
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Peaks(
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        memory=32 * 2**30,
        memory_bandwidth=1640e9,
        link_bandwidth=800e9 / 2,
        source="https://cloud.google.com/tpu/docs/v6e",
    ),
    "a100": Peaks(
        kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12,
        memory=40 * 10**9,
        memory_bandwidth=1.555e12,
        link_bandwidth=600e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "a100-80gb": Peaks(
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        memory=80 * 10**9,
        memory_bandwidth=2.039e12,
        link_bandwidth=600e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "a100-pcie": Peaks(  # linked in pairs
        kinds=("NVIDIA A100 80GB PCIe",),
        flops=312e12,
        memory=80 * 10**9,
        memory_bandwidth=1.935e12,
        link_bandwidth=600e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "h100": Peaks(  # SXM
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989.4e12,
        memory=80 * 10**9,
        memory_bandwidth=3.35e12,
        link_bandwidth=900e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h100-nvl": Peaks(
        kinds=("NVIDIA H100 NVL",),
        flops=835.5e12,
        memory=94 * 10**9,
        memory_bandwidth=3.9e12,
        link_bandwidth=600e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h100-pcie": Peaks(
        kinds=("NVIDIA H100 PCIe",),
        flops=756e12,
        memory=80 * 10**9,
        memory_bandwidth=2.0e12,
        link_bandwidth=600e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h200": Peaks(  # SXM
        kinds=("NVIDIA H200",),
        flops=989.4e12,
        memory=141 * 10**9,
        memory_bandwidth=4.8e12,
        link_bandwidth=900e9 / 2,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
}


def peaks_of(device_kind: str) -> Peaks | None:
    """Return the peaks of a device by JAX's name for it, or None for one that is not in the table."""
    return next((peaks for peaks in PEAKS.values() if device_kind in peaks.kinds), None)
