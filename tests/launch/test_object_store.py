"""A run whose folder is gs://.. and no disk: killed and started again, read by the other programs, and misused."""

import json
import subprocess
import sys

import pytest

from tests.launch.processes import ROOT, assert_same_run, environment
from tests.launch.test_train import SMALL
from tests.object_store.server import object_store

pytestmark = pytest.mark.heavy

RUN = "gs://bucket/run"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config file and the store's objects, and the environment of programs."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "small.py").write_text(SMALL.format(directory=str(folder / "data")))
    with object_store(folder / "objects") as variables:
        path = f"{variables.pop('PYTHONPATH')}:{ROOT}"
        yield folder, environment(folder, **variables, GLIBC_TUNABLES="") | {"PYTHONPATH": path}


def _run(place, code, *command):
    folder, variables = place
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "gs:").exists()
    return done


def _train(place, code, workdir, *arguments, program=(ROOT / "launch" / "train.py",)):
    return _run(place, code, *program, f"--config={place[0] / 'small.py'}", f"--workdir={workdir}", *arguments)


def test_a_run_in_a_store_is_killed_goes_on_and_is_read_by_the_other_programs(place):
    killed = ("-m", "tests.launch.disturbed", "SIGKILL", "apr_jax.checkpoints.integrity.write_sums:2")
    _train(place, -9, RUN, program=killed)
    objects = place[0] / "objects" / "bucket"
    assert (objects / "run/checkpoints/sft/2/commit_success.txt").exists()
    assert (objects / "run/checkpoints/sft/4/policy").exists()
    assert not (objects / "run/checkpoints/sft/4/commit_success.txt").exists()
    assert f"{RUN}/report.html" in _train(place, 0, RUN).stdout
    lines = (objects / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    evaluate = (ROOT / "launch" / "evaluate.py", f"--checkpoint={RUN}/best", "--num_problems=2")
    _run(place, 0, *evaluate, "--json=gs://bucket/out/figures.json")
    assert json.loads((objects / "out/figures.json").read_text())["num_problems"] == 2


@pytest.mark.slow
def test_a_run_in_a_store_and_one_on_a_disk_leave_the_same(place):
    _train(place, 0, RUN)
    _train(place, 0, place[0] / "local")
    assert_same_run(place[0] / "objects" / "bucket" / "run", place[0] / "local")


def test_weights_that_must_be_mapped_are_refused_at_once(place):
    folder = place[0] / "objects" / "bucket" / "hf"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    said = _train(place, 2, "gs://bucket/refused", "--start=gs://bucket/hf").stderr
    assert "gs://bucket/hf: a Hugging Face folder or a GGUF file must lie on this machine" in said
    assert not (place[0] / "objects" / "bucket" / "refused").exists()
