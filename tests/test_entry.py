"""What entry points share: whose log lines reach the user."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.launch.test_evaluate import launched

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import logging
import absl.logging
from apr_jax import entry

def main():
    absl.logging.warning("a library touched a file")
    logging.getLogger("orbax.checkpoint").warning("another one, too")
    logging.getLogger("orbax.checkpoint").error("a library failed")
    logging.getLogger("apr_jax.data.tokenized").warning("3 calls are dropped")

entry.run(main)
"""


def _errors(*arguments: str) -> str:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_our_warnings_and_everybodys_errors_are_shown():
    errors = _errors()
    assert "3 calls are dropped" in errors
    assert "a library failed" in errors
    assert "a library touched a file" not in errors
    assert "another one" not in errors


def test_a_verbosity_asked_for_shows_all():
    errors = _errors("--verbosity=0")
    assert "a library touched a file" in errors
    assert "another one" in errors


@pytest.mark.parametrize("flag", ["json", "plot", "rollouts"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere/file{ending}", "there is no folder nowhere; make it first"),
        ("folder{ending}", "this is a folder; name a file in it"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, flag, value, message):
    script = {"json": "generate_data.py", "plot": "benchmark_decode.py", "rollouts": "evaluate.py"}[flag]
    value = value.format(ending=".svg" if flag == "plot" else "")
    (tmp_path / value).mkdir() if "/" not in value else None
    done = launched(script, tmp_path, f"--{flag}={value}", check=2)
    assert f"--{flag}={value}: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_for_a_program_stands_alone_on_standard_output(tmp_path):
    done = launched("generate_data.py", tmp_path, "--num_problems=20", "--json=-")
    assert json.loads(done.stdout)["problems"] == 20
    assert "20 problems in" in done.stderr


@pytest.mark.parametrize("text", ["root:x:0:0\n", "from nowhere import it\n", "x = 1\n"])
def test_what_is_no_config_file_is_refused(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    done = launched("generate_data.py", tmp_path, "--config=mine.py", check=2)
    assert "Traceback" not in done.stderr
