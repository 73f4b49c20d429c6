"""launch/train.py as a user runs it: to its end, killed and started again, stopped by a signal, and misused."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from tests.launch.processes import ROOT, assert_same_run, environment
from tests.train.small import small_config

pytestmark = pytest.mark.heavy

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


def _start(place, workdir, *arguments, disturbed=None):
    """Starts a run; `disturbed` is a signal's name and a moment (disturbed.py)."""
    shared = environment(place, GLIBC_TUNABLES="")  # set: no second start for huge pages
    program = ["-m", "tests.launch.disturbed", *disturbed] if disturbed else [str(ROOT / "launch" / "train.py")]
    command = [sys.executable, *program, f"--config={place / 'small.py'}", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, cwd=place, env=shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process, code=0):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


@pytest.fixture(scope="module")
def undisturbed(place):
    output, _ = _finish(
        _start(place, place / "whole", f"--json={place / 'whole.json'}", disturbed=("SIGKILL", "never"))
    )
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


@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(12, 1, marks=pytest.mark.slow)])
def test_killed_at_arbitrary_moments_and_started_again_gives_the_same_metrics(place, undisturbed, kills, seed):
    whole, _ = undisturbed
    workdir = place / f"killed_{kills}"
    touched = int(pathlib.Path(f"{whole}.touched").read_text())
    assert touched > 80
    for at in np.random.default_rng(seed).integers(1, touched // (kills + 1), kills):
        _finish(_start(place, workdir, disturbed=("SIGKILL", f"files:{at}")), -signal.SIGKILL)
    assert not (workdir / "summary.json").exists()
    _finish(_start(place, workdir))
    assert_same_run(workdir, whole)


def test_a_signal_saves_and_exits_with_75_and_grpo_starts_from_a_checkpoint(place, undisturbed):
    whole, _ = undisturbed
    workdir = place / "stopped"
    sft = f"--checkpoint={whole / 'checkpoints' / 'sft'}"
    stopped = _start(place, workdir, sft, disturbed=("SIGTERM", "apr_jax.train.rl.sample.choose_problems:2"))
    _, errors = _finish(stopped, 75)
    assert "Start again to go on" in errors
    assert [path.name for path in (workdir / "checkpoints" / "grpo").glob("[0-9]*")] == ["1"]
    _finish(_start(place, workdir))  # the policy that was named is saved, and needs no name any more
    ours, theirs = (
        [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"grpo"' in line]
        for run in (workdir, whole)
    )
    assert len(ours) == 4
    assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.nlayers=2"], "num_layers"),
        (["--config.sft.num_steps=many"], "sft.num_steps"),
        (["--config.engine.pages=4"], "engine.pages=4 leaves 3 usable pages"),
        (["--checkpoint=/nowhere"], "no such folder"),
        (["--checkpoint=/nowhere/best"], "no such folder"),
        (["--start=/nowhere"], "--start=/nowhere: no such folder"),
        (["--start=.", "--checkpoint=."], "name one of them"),
    ],
)
def test_what_cannot_work_is_refused_at_once(place, arguments, message):
    _, errors = _finish(_start(place, place / "refused", *arguments), 2)
    assert message in errors
    assert "Traceback" not in errors
    assert not (place / "refused").exists()


@pytest.mark.parametrize("flag", ["start", "checkpoint"])
@pytest.mark.parametrize("named", [(), ("--config.data.tokenizer=auto",)], ids=["as configured", "auto"])
def test_a_policy_without_tokenizer_is_refused(place, flag, named):
    config = small_config()
    save_hf(place / "bare", config.model, init_params(config.model, 0))
    _, errors = _finish(_start(place, place / "refused", f"--{flag}={place / 'bare'}", *named), 2)
    assert f"{place / 'bare'} holds no tokenizer.json" in errors
    assert "Traceback" not in errors
    assert not (place / "refused").exists()


def test_a_changed_configuration_is_refused(place, undisturbed):
    workdir, _ = undisturbed
    _, errors = _finish(_start(place, workdir, "--config.sft.rows_per_step=8"), 2)
    assert "sft.rows_per_step: 4 saved, 8 now" in errors
