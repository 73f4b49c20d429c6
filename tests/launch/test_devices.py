"""The same configuration as it stands on machines with 1, 2, 4 and 8 devices: all are used, and the same is learnt."""

import json
import subprocess
import sys

import pytest

from tests.launch.processes import ROOT, environment

pytestmark = pytest.mark.slow


def run(place, devices, *flags):
    """Trains `:smoke` on so many devices of a CPU. Returns the folder and what was said."""
    workdir = place / f"{devices}{len(flags)}"
    command = [sys.executable, "launch/train.py", "--config=configs/grpo.py:smoke", f"--workdir={workdir}"]
    command += [f"--config.data.directory={place / 'data'}", "--config.grpo.num_steps=1", *flags]
    split = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment(place, **split), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir, done.stderr


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["phase"] == "sft"]


def test_one_to_eight_devices(tmp_path):
    found = {devices: run(tmp_path, devices) for devices in (1, 2, 4, 8)}
    for devices, (workdir, said) in found.items():
        assert f"on each of {devices} data shards" in said
        assert "idle" not in said
        assert losses(workdir) == pytest.approx(losses(found[1][0]), rel=1e-4)


def test_idle_devices_are_named_once(tmp_path):
    _, said = run(tmp_path, 8, "--config.mesh.data=2", "--config.engine.lanes=-1", "--config.engine.pages=-1")
    assert said.count("6 of 8 devices are idle: mesh.data=2") == 1
    assert "mesh.data=-1 uses 8" in said
