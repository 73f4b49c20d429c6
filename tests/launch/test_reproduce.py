"""launch/reproduce.py as a user runs it: its list, a part that is stopped and gone on with, and what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.test_evaluate import ROOT, launched

pytestmark = pytest.mark.heavy


def _start(home, *arguments):
    command = [sys.executable, str(ROOT / "launch" / "reproduce.py"), "--quick", "--workdir=work", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_part_is_stopped_gone_on_with_and_then_done(tmp_path):
    process = _start(tmp_path, "--only=facts")
    deadline = time.monotonic() + 240
    while not (tmp_path / "work/runs/facts/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 75, errors
    assert not json.loads((tmp_path / "work/parts.json").read_text())["facts"]["done"]

    output, errors = (process := _start(tmp_path, "--only=facts", "--json=-")).communicate(timeout=240)
    assert process.returncode == 0, errors
    assert {claim["ours"] for claim in json.loads(output)["claims"]} == {"not run yet"}
    assert (tmp_path / "work/claims.md").read_text().startswith("| | claim |")
    output, _ = _start(tmp_path, "--list").communicate(timeout=240)
    assert "done  facts" in output
    assert "launch/train.py --config=configs/countdown4.py:adaptive.quick" in output

    output, errors = (process := _start(tmp_path, "--only=facts")).communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "launch/train.py" not in output  # nothing is done twice


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only=fact"], 2, "--only=fact: no part fact; --list shows their names"),
        (["--only=adaptive_rl"], 2, "adaptive_rl needs adaptive, not done yet"),
        (["--only=facts", "--config=nowhere.py"], 1, "facts ended with exit code 2"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, arguments, code, message):
    done = launched("reproduce.py", tmp_path, "--quick", *arguments, check=code)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
