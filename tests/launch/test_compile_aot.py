"""launch/compile_aot.py: what is wrong is said before anything is compiled."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology says what to compile for: tpu:v5e:4x4"),
        (["--topology=tpu:v6:4x4"], "did you mean tpu:v5e:4x4?"),
        (["--topology=tpu:v5e:4x4", "--candidates=0"], "candidates"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "compile_aot.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
