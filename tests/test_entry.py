"""What entry points share: whose log lines reach the user."""

import pathlib
import subprocess
import sys

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
