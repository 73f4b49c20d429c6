"""launch/accelerator_check.py on CPU devices, as a user runs it, and what it makes of checks that differ or fail."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]


def accelerator_check(*arguments, check=0, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    command = [sys.executable, str(ROOT / "launch" / "accelerator_check.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_two_cpu_devices_agree_with_one(tmp_path):
    found_at, page = tmp_path / "check.json", tmp_path / "check.html"
    done = accelerator_check(f"--json={found_at}", f"--page={page}", "--nospeed", JAX_NUM_CPU_DEVICES="2")
    figures = json.loads(found_at.read_text())
    assert figures["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    names = " ".join(figures["checks"])
    for part in ("training attention", "prefill", "decode", "SFT step", "GRPO step"):
        assert part in names
    for row in figures["checks"].values():
        assert row["agrees"], row
        assert row["reason"]
        assert set(row["tolerances"]) <= set(row["found"])
    assert "logp_diff_max" in figures["checks"]["GRPO step, float32"]["found"]
    assert {"jax", "flax", "python"} <= set(figures["versions"])
    assert "All agrees with the CPU" in page.read_text()
    assert "agrees" in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--minutes=-1", "--minutes"),
        ("--page=check.txt", "the name must end in .html"),
        ("--config.mesh.datas=64", "no such config field"),
    ],
)
def test_what_cannot_be_checked_exits_with_2(argument, message):
    assert message in accelerator_check(argument, check=2, JAX_NUM_CPU_DEVICES="2").stderr
