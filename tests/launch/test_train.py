"""launch/train.py as a user runs it: to its end, killed and started again, stopped by a signal, and misused."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = """
from tests.train.small import small_config_dict
def get_config():
    return small_config_dict({directory!r})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config file, and whatever runs share: data and compiled programs."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "small.py").write_text(SMALL.format(directory=str(folder / "data")))
    return folder


def _start(place, workdir, *arguments):
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={place / 'small.py'}"]
    command += [f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process, code=0):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


def _when(process, workdir, phase, step):
    """Returns as soon as the run has written the metrics of a step."""
    path = workdir / "metrics.jsonl"
    wanted = f'{{"step": {step}, "phase": "{phase}"'
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and wanted in path.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise TimeoutError(f"no {phase} step {step}")


@pytest.fixture(scope="module")
def undisturbed(place):
    output, _ = _finish(_start(place, place / "whole", f"--json={place / 'whole.json'}"))
    return place / "whole", output


def test_a_run_leaves_what_it_promises(place, undisturbed):
    workdir, output = undisturbed
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["step"]) for r in records] == [("sft", s) for s in range(1, 7)] + [
        ("grpo", s) for s in range(1, 5)
    ]
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary) == {"before", "after", "before_sampled", "after_sampled"}
    assert summary["after"]["num_problems"] == 4
    assert json.loads((place / "whole.json").read_text()) == summary
    for name in ("config.json", "report.html", "rollouts.jsonl", "timings.jsonl", "checkpoints/reference"):
        assert (workdir / name).exists(), name
    assert "after " in output


def test_killed_and_started_again_gives_the_same_metrics(place, undisturbed):
    whole, _ = undisturbed
    workdir = place / "killed"
    for phase, step in (("sft", 3), ("grpo", 3)):
        process = _start(place, workdir)
        _when(process, workdir, phase, step)
        process.send_signal(signal.SIGKILL)
        _finish(process, -signal.SIGKILL)
        assert not (workdir / "summary.json").exists()
    _finish(_start(place, workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    strip = {"latency_ms", "tokens_per_second", "seconds", "prefilled_tokens"}
    before, after = (json.loads((run / "summary.json").read_text()) for run in (whole, workdir))
    for label in before:
        assert {k: v for k, v in before[label].items() if k not in strip} == {
            k: v for k, v in after[label].items() if k not in strip
        }


def test_a_signal_saves_and_exits_with_75_and_grpo_starts_from_a_checkpoint(place, undisturbed):
    whole, _ = undisturbed
    workdir = place / "stopped"
    longer = "--config.grpo.num_steps=24"  # enough that the signal comes before the end, also on a busy machine
    process = _start(place, workdir, longer, f"--checkpoint={whole / 'checkpoints' / 'sft'}")
    _when(process, workdir, "grpo", 1)
    process.send_signal(signal.SIGTERM)
    _, errors = _finish(process, 75)
    assert "Start again to go on" in errors
    _finish(_start(place, workdir, longer))  # the policy that was named is saved, and needs no name any more
    ours, theirs = (
        [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"grpo"' in line]
        for run in (workdir, whole)
    )
    assert [json.loads(line)["step"] for line in ours] == list(range(1, 25))
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.nlayers=2"], "num_layers"),
        (["--config.sft.num_steps=many"], "sft.num_steps"),
        (["--config.rollout.num_pages=4"], "rollout.num_pages=4 leaves 3 usable pages"),
        (["--checkpoint=/nowhere"], "no such folder"),
        (["--start=/nowhere"], "--start=/nowhere: no such folder"),
        (["--start=.", "--checkpoint=."], "name one of them"),
    ],
)
def test_what_cannot_work_is_refused_at_once(place, arguments, message):
    began = time.monotonic()
    _, errors = _finish(_start(place, place / "refused", *arguments), 2)
    assert message in errors
    assert "Traceback" not in errors
    assert time.monotonic() - began < 10  # two seconds on an idle machine
    assert not (place / "refused").exists()


def test_a_changed_configuration_is_refused(place, undisturbed):
    workdir, _ = undisturbed
    _, errors = _finish(_start(place, workdir, "--config.sft.rows_per_step=8"), 2)
    assert "sft.rows_per_step: 4 saved, 8 now" in errors
