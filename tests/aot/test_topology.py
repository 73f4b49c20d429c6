"""Names of accelerators: what they say, and what is told about the ones that are none."""

import os

import pytest

from apr_jax.aot import topology
from apr_jax.aot.topology import parse_topology, prepare_process
from apr_jax.config import ConfigError


@pytest.mark.parametrize(
    ("name", "platform", "devices"), [("tpu:v5e:4x4", "tpu", 16), ("tpu:v5p:2x2x1", "tpu", 4), ("gpu:h100:8", "gpu", 8)]
)
def test_a_name_says_platform_and_devices(name, platform, devices):
    parsed = parse_topology(name)
    assert (parsed.platform, parsed.num_devices) == (platform, devices)
    assert parsed.peaks.source.startswith("https://")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu:v5:4x4", r"did you mean tpu:v5e:4x4\?"),
        ("v5p:2x2x1", r"did you mean tpu:v5p:2x2x1\?"),
        ("h100", r"did you mean gpu:h100:8\?"),
        ("gpu:h100", r"did you mean gpu:h100:8\?"),
        ("tpu:v5e:4x4x4", r"tpu:v5e takes 2 numbers above 0, as in tpu:v5e:4x4"),
        ("tpu:v5p:2x0x1", r"tpu:v5p takes 3 numbers above 0"),
        ("gpu:h100:16", r"at most 8 GPUs"),
    ],
)
def test_a_wrong_name_says_what_was_meant(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    monkeypatch.setenv("JAX_PLATFORMS", "left alone")
    with pytest.raises(ConfigError, match=r"libtpu.*make compile-aot"):
        prepare_process(parse_topology("tpu:v5e:4x4"))
    assert os.environ["JAX_PLATFORMS"] == "left alone"


def test_a_module_whose_package_is_missing_is_not_installed():
    assert not topology._installed("no_such_package.no_such_module")
    assert topology._installed("json")
