"""A configuration takes the devices that there are: all of them, with a warning for idle ones, or a refusal."""

import logging
import os
import subprocess
import sys

import jax
import pytest

from apr_jax.config import ConfigError, MeshConfig
from apr_jax.config_dict import from_config_dict
from apr_jax.parallel.fit import fit, fit_to
from apr_jax.parallel.mesh import _warn_of_idle, make_mesh
from configs.grpo import get_config
from tests.configs import LAPTOP, PAPER
from tests.launch.processes import ROOT


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_all_devices_are_taken_and_a_device_keeps_its_rows(devices):
    mesh = make_mesh(PAPER.mesh, jax.devices()[:devices])
    assert dict(mesh.shape) == {"data": devices, "fsdp": 1, "tensor": 1}
    fitted = fit_to(PAPER, mesh)
    assert fitted.sft.rows_per_step == PAPER.sft.rows_per_step
    assert fitted.sft.microbatches == PAPER.sft.microbatches // devices
    assert fitted.sft.validation_rows == PAPER.sft.validation_rows
    assert fitted.grpo.rows_per_microbatch == PAPER.grpo.rows_per_microbatch * devices
    assert fitted.engine == PAPER.engine
    assert fit_to(fitted, mesh) is fitted


def test_sixteen_devices_and_other_axes():
    fitted = fit(PAPER, MeshConfig(data=16, fsdp=1, tensor=1))
    assert (fitted.sft.microbatches, fitted.grpo.rows_per_microbatch) == (4, 64)
    mesh = make_mesh(from_config_dict(get_config("7b")).mesh)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_laptop_has_one_microbatch_on_its_two_devices():
    fitted = fit_to(LAPTOP, make_mesh(LAPTOP.mesh, jax.devices()[:2]))
    assert (fitted.sft.microbatches, fitted.grpo.rows_per_microbatch) == (1, 8)


def test_what_does_not_divide_is_refused_with_both_numbers_and_what_to_set():
    with pytest.raises(ConfigError, match=r"all 8 devices, and mesh\.fsdp=3 \* mesh\.tensor=1 = 3 does not"):
        make_mesh(MeshConfig(data=-1, fsdp=3, tensor=1))
    six = make_mesh(PAPER.mesh, jax.devices()[:6])
    with pytest.raises(ConfigError, match=r"rows_per_step=256 must be a multiple of .*=6; set mesh\.data=4, or"):
        fit_to(PAPER, six)
    with pytest.raises(ConfigError, match=r"needs 16 devices, but there are 8; mesh\.data=-1 takes those"):
        make_mesh(MeshConfig(data=16, fsdp=1, tensor=1))


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ((2, 1, 1), "6 of 8 devices are idle: mesh.data=2 * mesh.fsdp=1 * mesh.tensor=1 uses 2; mesh.data=-1 uses 8"),
        ((1, 3, 1), "5 of 8 devices are idle: mesh.data=1 * mesh.fsdp=3 * mesh.tensor=1 uses 3; mesh.data=2 uses 6"),
        (
            (1, 5, 1),
            "3 of 8 devices are idle: mesh.data=1 * mesh.fsdp=5 * mesh.tensor=1 uses 5; sizes of mesh.fsdp and "
            "mesh.tensor whose product divides 8 can use all",
        ),
        ((-1, 2, 2), None),
        ((8, 1, 1), None),
    ],
)
def test_idle_devices_are_named_once(mesh, text, caplog):
    _warn_of_idle.cache_clear()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))))
    assert len(caplog.records) == (text is not None)
    if text is not None:
        assert caplog.records[0].getMessage() == text


@pytest.mark.heavy
@pytest.mark.parametrize(("mesh", "used"), [("-1, fsdp=1", 2), ("-1, fsdp=4", 4), ("3, fsdp=1", 3)])
def test_a_cpu_is_split_as_the_mesh_needs_and_nothing_of_it_is_idle(mesh, used):
    code = f"""
from apr_jax.config import MeshConfig
from apr_jax.parallel.mesh import make_mesh
print(make_mesh(MeshConfig(data={mesh}, tensor=1)).size)
"""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), "idle" in done.stderr) == (str(used), False)
