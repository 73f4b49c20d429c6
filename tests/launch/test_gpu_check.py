"""launch/gpu_check.py where there is no GPU, and what it makes of checks."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU here: JAX finds 1 x cpu. Nothing was checked"),
        (["--lanes=1,x"], "--lanes=1,x must be positive whole numbers"),
    ],
)
def test_what_cannot_be_checked_exits_with_2(arguments, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "gpu_check.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
