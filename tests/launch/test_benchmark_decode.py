"""launch/benchmark_decode.py as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = "--config=configs/benchmark_decode.py:smoke"


def benchmark(*arguments, check=0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "launch/benchmark_decode.py", SMOKE, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == check, done.stderr
    return done


def test_figures_table_and_picture(tmp_path):
    figures_at, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    done = benchmark(
        "--lanes=1,4", "--problems=4", "--peers=vllm", "--peer_lanes=4", f"--json={figures_at}", f"--plot={picture}"
    )
    figures = json.loads(figures_at.read_text())
    assert {"device", "model", "lanes", "compile_seconds", "recompiles_after_warmup", "limits"} <= set(figures)
    assert figures["recompiles_after_warmup"] == figures["workload_of_problems"]["compilations"] == 0
    assert {"tokens_per_second", "ms_per_step", "host_share", "roofline_share"} <= set(figures["lanes"]["4"])
    assert figures["workload_of_problems"]["problems"] == 4
    for shown in ("roofline", "lanes occupied", "TTFT", "engine memory", "apr_jax"):
        assert shown in done.stdout
    assert "vllm" in figures["peers"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lanes=1,x", "--lanes=1,x must be positive whole numbers"),
        ("--peers=gpt", "there is no peer 'gpt'; choose of hf, tunix, vllm, llama_cpp"),
        ("--new=10", "leave nothing to measure"),
        ("--checkpoint=missing.gguf", "--checkpoint=missing.gguf: no such folder or file"),
        ("--prompt=500", "exceed model.max_seq_len=512"),
    ],
)
def test_what_cannot_be_measured_is_told(argument, message):
    done = benchmark(argument, "--problems=0", "--peer_lanes=1", check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
