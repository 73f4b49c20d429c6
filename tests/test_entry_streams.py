"""What is printed for people may fail; what is printed for programs may not."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import pathlib, sys
from apr_jax import entry

def main():
    for _ in range(10_000):
        print("a line for people", file=sys.stderr)
    pathlib.Path(sys.argv[0]).with_suffix(".done").touch()
    print("the result")

entry.run(main)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def _run(program, **streams):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}
    return subprocess.run([sys.executable, str(program)], env=environment, check=False, text=True, **streams)


def test_standard_error_on_a_full_disk_stops_nothing(program):
    with open("/dev/full", "w") as full:
        done = _run(program, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (0, "the result\n")
    assert program.with_suffix(".done").exists()


def test_a_reader_of_standard_error_that_goes_away_stops_nothing(program):
    reading, writing = os.pipe()
    os.close(reading)
    done = _run(program, stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "the result\n")


def test_standard_output_on_a_full_disk_is_one_sentence(program):
    with open("/dev/full", "w") as full:
        done = _run(program, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith("standard output: No space left on device; free some space on this disk and start again")
