"""launch/local_hosts.py as a user runs it: several hosts learn what one learns, through a signal and a host's death."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.processes import ROOT, environment

pytestmark = pytest.mark.heavy

SMALL = """
from tests.train.small import small_config_dict
def get_config():
    config = small_config_dict({directory!r})
    config.mesh.data, config.mesh.fsdp = 2, 2
    config.rollout.update(max_steps=64, temperature=1.0)
    config.grpo.update(num_steps=6, checkpoint_every=1)
    config.grpo.reward.update(token_price=0.01, failures_pay=True)  # something to learn for one that solves nothing
    config.evaluation.update(num_problems=2)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config file, and whatever runs share: data and compiled programs."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "small.py").write_text(SMALL.format(directory=str(folder / "data")))
    return folder


def _train(place, workdir):
    return [sys.executable, str(ROOT / "launch/train.py"), f"--config={place / 'small.py'}", f"--workdir={workdir}"]


def _local_hosts(command, hosts=2, devices=2):
    launcher = str(ROOT / "launch/local_hosts.py")
    return [sys.executable, launcher, f"--hosts={hosts}", f"--devices-per-host={devices}", "--", *command]


def _start(place, command, **more):
    shared = environment(place, **more)
    return subprocess.Popen(command, env=shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process, code=0):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


def _when(process, workdir, phase, step):
    """Returns as soon as the run has written the metrics of a step."""
    path, wanted = workdir / "metrics.jsonl", f'{{"step": {step}, "phase": "{phase}"'
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and wanted in path.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise TimeoutError(f"no {phase} step {step}")


def _host_process(launcher, host):
    """The id of the process that is this host of a job."""
    for child in pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"APR_HOST={host}\0" in pathlib.Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no host {host}")


def _records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_hosts_killed_resumed_and_stopped_learn_what_one_process_learns(place):
    whole, parts = place / "whole", place / "parts"
    _finish(_start(place, _train(place, whole), JAX_NUM_CPU_DEVICES="4"))
    job = _local_hosts([*_train(place, parts), "--config.grpo.num_steps=60"])  # its end is not reached

    process = _start(place, job)
    _when(process, parts, "grpo", 2)
    os.kill(_host_process(process, 1), signal.SIGKILL)
    _, errors = _finish(process, 128 + signal.SIGKILL)
    assert "host 1 was killed by SIGKILL: ending the other hosts" in errors

    process = _start(place, job)
    _when(process, parts, "grpo", 6)
    process.send_signal(signal.SIGTERM)
    _, errors = _finish(process, 75)
    assert errors.count("Stopped by a signal; everything is saved") == 1  # told by host 0
    assert not (parts / "summary.json").exists()

    expected, actual = _records(whole), _records(parts)
    steps = [("sft", step) for step in range(1, 7)] + [("grpo", step) for step in range(1, 7)]
    assert [(record["phase"], record["step"]) for record in expected] == steps
    assert max(record["grad_norm"] for record in expected if record["phase"] == "grpo") > 1e-3
    for ours, theirs in zip(actual, expected, strict=False):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            expected_value = pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
            assert ours[name] == expected_value, f"{ours['phase']} {ours['step']}: {name}"
    saved = max(int(folder.name) for folder in (parts / "checkpoints/grpo").iterdir() if folder.name.isdigit())
    assert len(actual) == 6 + saved >= len(expected)
    for label in ("before", "before_sampled"):
        summaries = [json.loads((run / f"evaluations/{label}.json").read_text())["summary"] for run in (whole, parts)]
        for name in ("accuracy", "num_problems", "total_tokens", "sequential_tokens"):
            assert summaries[0][name] == summaries[1][name], f"{label} {name}"


FAILS = "import os, sys, time; host = os.environ['APR_HOST']; print('here', flush=True); "


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("host == '1' and sys.exit(3); time.sleep(100)", 3, "host 1 ended with exit code 3: ending the other hosts"),
        ("host == '2' and os.kill(os.getpid(), 9); time.sleep(100)", 137, "host 2 was killed by SIGKILL"),
        ("sys.exit(75)", 75, ""),
        ("pass", 0, ""),
    ],
)
def test_the_first_host_that_fails_is_named_and_ends_the_job(place, program, code, message):
    command = _local_hosts([sys.executable, "-c", FAILS + program], hosts=3, devices=1)
    output, errors = _finish(_start(place, command), code)
    assert sorted(output.splitlines()) == [f"host {host}: here" for host in range(3)]
    assert message in errors


@pytest.mark.parametrize(
    ("number", "code"), [("SIGKILL", -9), ("SIGTERM", 128 + 15), ("SIGINT", 128 + 2), ("SIGHUP", 128 + 15)]
)
def test_no_host_outlives_the_launcher(place, number, code):
    """Whatever it runs, and although the launcher's own output is read to its end."""
    command = _local_hosts([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(100)"])
    process = _start(place, command)
    pids = [int(process.stdout.readline().split(": ")[1]) for _ in range(2)]
    process.send_signal(signal.Signals[number])
    process.communicate(timeout=20)
    assert process.returncode in (code, 1 if number == "SIGINT" else code)
    deadline = time.monotonic() + 5
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_job_needs_a_command(place):
    _, errors = _finish(_start(place, _local_hosts([])), 2)
    assert "no command" in errors
    assert "Traceback" not in errors
