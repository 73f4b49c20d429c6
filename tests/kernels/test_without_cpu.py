"""The contract of kernels/cpu/: a copy of the package without that folder passes the tests on plain XLA.

Here with a few quick files; `make test-without-cpu-kernels` runs whole rooms.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TESTS = ["tests/kernels/test_choice.py", "tests/model/test_ops.py", "tests/model/test_held_weights.py"]


@pytest.mark.heavy
def test_a_copy_without_the_cpus_kernels_passes_the_tests(tmp_path):
    without = shutil.ignore_patterns("cpu", "__pycache__", "oracles", "test_without_cpu.py")
    for name in ("apr_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert not (tmp_path / "apr_jax" / "kernels" / "cpu").exists()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
