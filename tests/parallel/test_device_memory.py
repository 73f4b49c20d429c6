"""The memory of devices that are here, of such that are only compiled for, and of such that say nothing."""

import types

import jax
import numpy as np
import pytest

from apr_jax.parallel.device_memory import memory_limit


def mesh_of(kind, platform, stats=None):
    def memory_stats():
        if isinstance(stats, Exception):
            raise stats
        return stats

    device = types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=memory_stats)
    return types.SimpleNamespace(devices=np.array([device]), size=1)


NOT_HERE = jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices.")


@pytest.mark.parametrize(
    ("kind", "platform", "stats", "expected"),
    [
        ("NVIDIA H200", "gpu", {"bytes_limit": 105}, 105),
        ("NVIDIA H200", "gpu", {}, None),
        ("NVIDIA H200", "gpu", None, None),
        ("NVIDIA H100 80GB HBM3", "gpu", NOT_HERE, 60 * 10**9),
        ("TPU v5 lite", "tpu", NOT_HERE, 15.75 * 2**30),
        ("TPU v9", "tpu", NOT_HERE, None),
    ],
)
def test_a_device_has_what_jax_gives(kind, platform, stats, expected):
    assert memory_limit(mesh_of(kind, platform, stats)) == expected


def test_the_fraction_can_be_set(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert memory_limit(mesh_of("NVIDIA H100 80GB HBM3", "gpu", NOT_HERE)) == 72 * 10**9


def test_devices_of_a_cpu_share_its_memory():
    devices = np.array(jax.devices()[:4])
    four, one = (types.SimpleNamespace(devices=part, size=part.size) for part in (devices, devices[:1]))
    assert memory_limit(four) == memory_limit(one) // 4
