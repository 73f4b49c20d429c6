"""launch/compare.py as a user runs it: two policies, a grid that is stopped and gone on with, and what is wrong."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.evaluation.compare.store import read_records, read_results
from apr_jax.model.params import init_params
from tests.evaluation.test_run import INTERFACE_KEYS
from tests.launch.test_evaluate import ROOT, launched, small_config

pytestmark = pytest.mark.heavy

_compare = functools.partial(launched, "compare.py")


def saved(folder, config, seed):
    params = init_params(config.model, seed)
    with Checkpoints(folder, "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": params}, {})
    record = {"step": 1, "phase": "grpo", "accuracy": 0.5, "sequential_tokens": 300.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two adaptive runs and a serial one, as training leaves them."""
    home = tmp_path_factory.mktemp("home")
    values = to_dict(small_config(home))
    config = from_config_dict(values)
    values["data"]["method"] = "serial"
    for seed, (name, its) in enumerate({"one": config, "two": config, "sos": from_config_dict(values)}.items()):
        saved(home / name, its, seed)
    return home


def test_two_runs(home):
    arguments = ("--policies=a=one,b=two,c=one", "--split=validation", "--json=out.json", "--figure=runs.svg")
    done = _compare(home, *arguments)
    assert "4 problems (validation)" in done.stdout  # the split's, although evaluation.num_problems asks for more
    assert "b against a (95 %, paired):" in done.stdout
    document = json.loads((home / "out.json").read_text())
    assert set(document["summaries"]) == {"a", "b", "c"}
    for difference in document["differences"]["c"].values():  # the same policy
        assert difference["change"] == difference["change_low"] == 0
    tokens = document["differences"]["b"]["sequential_tokens"]
    assert tokens["second"] == document["summaries"]["b"]["sequential_tokens"]
    assert (home / "runs.svg").read_text().count("<svg") == 1
    assert not (home / "data").exists()  # held-out problems are drawn without their demonstrations


GRID = (
    "--policies=one=one,sos=sos",
    "--methods=one,sos",
    "--temperatures=0,1",
    "--context_windows=48,64",
    "--num_problems=4",
    "--keep_rollouts=2",
    "--workdir=grid",
)


def test_a_grid_is_gone_on_with_after_a_stop(home):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "compare.py"), *GRID],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (home / "grid" / "results.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Start again to go on" in errors
    kept = read_results(home / "grid")
    assert 1 <= len(kept) < 8
    whole = (home / "grid" / "results.jsonl").read_text()
    (home / "grid" / "results.jsonl").write_text(whole + whole[:100])  # as a crash of the machine may leave it

    done = _compare(home, *GRID)
    assert f"{len(kept)} of 8 cells were done before" in done.stderr
    rows = read_results(home / "grid")
    assert rows[: len(kept)] == kept  # their times and all: they were not run again
    assert {(r["method"], r["temperature"], r["context_window"]) for r in rows} == {
        (method, temperature, window) for method in ("one", "sos") for temperature in (0, 1) for window in (48, 64)
    }
    for row in rows:
        assert set(INTERFACE_KEYS) <= set(row)
        assert row["num_problems"] == 4
        assert (row["seed"], row["lanes"], row["problems"]) == (0, 4, "test")
        assert row["checkpoint"] == row["policy"] == row["method"]
        assert "--context_windows=48,64" in row["command"]
        records = read_records(home / "grid", row)
        assert [("calls" in record) for record in records] == [True, True, False, False]
        assert sum(record["total_tokens"] for record in records) / 4 == row["total_tokens"]
    (same,) = {tuple((*r["numbers"], r["target"]) for r in read_records(home / "grid", row)) for row in rows}
    assert len(same) == 4
    assert "sos, temperature 1, window 64 against one, temperature 0, window 48" in done.stdout

    (home / "own.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n' * 2)
    refused = _compare(home, *GRID, "--problems=own.jsonl", check=2)
    assert "problems: " in refused.stderr
    assert "another --workdir" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies=a=one,b=nowhere"], "--policies=b"),
        (["--policies=a=one", "--methods=telepathy/a"], "telepathy"),
        (["--policies=a=one", "--methods=a,direct/a", "--budgets=4"], "leave out the budget of 4"),
        (["--policies=a=one", "--temperatures=-1"], "--temperatures"),
        (["--policies=a=one", "--context_windows=4096"], "--context_windows=4096"),
        (["--policies=a=one", "--split=train"], "split"),
        (["--policies=a=one", "--num_problems=5"], "more than the 4 problems of test"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(home, arguments, message):
    done = _compare(home, "--workdir=none", "--num_problems=4", *arguments, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "none").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--problems=one.jsonl", "--problems=one.jsonl: a comparison takes 2 problems or more"),
        ("--figure=runs.png", "--figure=runs.png: the name must end in .svg"),
        ("--figure=nowhere/runs.svg", "--figure=nowhere/runs.svg: there is no folder nowhere; make it first"),
    ],
)
def test_files_are_checked_before_any_policy_is_looked_for(tmp_path, argument, message):
    (tmp_path / "one.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n')
    done = _compare(tmp_path, argument, check=2)  # without a policy it would be 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
