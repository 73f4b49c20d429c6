"""The memory of devices that are here, of such that are only compiled for, and of such that say nothing."""

import types

import jax
import numpy as np
import pytest

from apr_jax.parallel.device_memory import bytes_on, local_bytes, memory_limit


def mesh_of(kind, platform, stats=None):
    def memory_stats():
        if isinstance(stats, Exception):
            raise stats
        return stats

    device = types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=memory_stats)
    return types.SimpleNamespace(devices=np.array([device]), size=1)


class _Accelerator:
    """A device of a CPU under another platform's name."""

    platform = "gpu"

    def __init__(self, device):
        self.device = device

    def __eq__(self, other):
        return self.device == other

    def __hash__(self):
        return hash(self.device)


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


def test_arrays_weigh_on_the_devices_that_hold_them(monkeypatch):
    devices = jax.devices()[:4]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    values = np.zeros((8, 4), np.float32)
    one = jax.device_put(values, devices[1])
    split = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.P("data")))
    assert local_bytes([one, split]) == 128 + 32
    assert bytes_on(mesh, {"one": one, "split": split, "host": values}) == (128 + 128) // 4, "a CPU's devices share"
    accelerator = types.SimpleNamespace(devices=np.array([_Accelerator(device) for device in devices]), size=4)
    assert bytes_on(accelerator, [one, split]) == 128 + 32
