"""launch/benchmark_train.py as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]


def benchmark(*arguments, check=0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "launch/benchmark_train.py", "--config=configs/benchmark_train.py:smoke", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == check, done.stderr
    return done


def test_figures_table_and_picture(tmp_path):
    figures_at, picture = tmp_path / "train.json", tmp_path / "train.png"
    done = benchmark("--phases=sft", "--turns=1", f"--json={figures_at}", f"--plot={picture}")
    figures = json.loads(figures_at.read_text())
    row = figures["sft"]["contestants"]["apr_jax"]
    assert 0 < row["flops_share"] < 1
    assert row["tokens_per_second"] > 0
    assert figures["sft"]["packing"] > 0.9
    assert "GFLOP/s" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unknown_peers_are_told():
    assert "--peers: there is no 'gpt'; choose of hf, trl" in benchmark("--peers=gpt", check=2).stderr
