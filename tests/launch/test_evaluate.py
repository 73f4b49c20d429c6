"""launch/evaluate.py as a user runs it: a run folder, a Hugging Face folder, and each way to be told what is wrong."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.config_dict import from_config_dict
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from configs.grpo import get_config
from tests.evaluation.test_run import INTERFACE_KEYS

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]


def small_config(folder):
    values = get_config("smoke")
    values.model.update(num_layers=1, embed_dim=32, mlp_dim=32, num_heads=1, num_kv_heads=1, max_seq_len=64)
    values.rollout.max_steps = 16
    values.engine.update(lanes=2, pages=32, prefill_lanes=2)
    values.data.update(directory=str(folder / "data"), num_train=4, num_validation=4, num_test=4)
    values.grpo.validation_problems = 4
    values.data.update(num_test_unseen_targets=4, num_workers=1)
    return from_config_dict(values)


def launched(script, cwd, *arguments, check=0, timeout=300):
    """A script of launch/, run in `cwd`; it must end with the exit code `check`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


evaluate = functools.partial(launched, "evaluate.py")


def make_home(home):
    """Fills a folder: a run in runs/, as training leaves it, and a Hugging Face folder of the same policy."""
    config = small_config(home)
    params = init_params(config.model, 0)
    with Checkpoints(home / "runs" / "tiny", "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": params}, {})
    save_hf(home / "hugging_face", config.model, params, load_tokenizer("builtin"))
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def newest(home):
    """What happened without --checkpoint: the figures, the rollouts and the process."""
    arguments = (
        "--split=validation",
        "--temperature=1",
        "--budget=3",
        "--max_tokens=60",
        "--json=figures.json",
        "--rollouts=threads.jsonl",
    )
    done = evaluate(home, *arguments)
    threads = [json.loads(line) for line in (home / "threads.jsonl").read_text().splitlines()]
    return json.loads((home / "figures.json").read_text()), threads, done


def test_without_arguments_it_takes_the_newest_run_and_its_own_configuration(newest):
    figures, threads, done = newest
    assert set(INTERFACE_KEYS) <= set(figures)
    assert figures["num_problems"] == 4  # the run's split, although evaluation.num_problems asks for more
    assert 0 < figures["total_tokens"] <= 16  # the run's rollout.max_steps
    assert (figures["checkpoint"], figures["temperature"]) == ("runs/tiny", 1.0)
    assert (figures["budget"], figures["max_tokens"]) == (3, 60)
    assert [record["label"] for record in threads] == ["tiny"] * 4
    assert all(record["calls"] for record in threads)
    assert "solved " in done.stdout
    assert done.stderr.splitlines()[-1].startswith("Evaluate: 4/4 rollout")
    said = [line for line in done.stderr.splitlines() if not line.startswith("Compiling ")]  # that may take long
    assert len(said) < 10, done.stderr  # libraries keep quiet


def test_a_hugging_face_folder_is_the_same_policy(home, newest):
    (home / "problems.jsonl").write_text(
        "".join(json.dumps({"numbers": r["numbers"], "target": r["target"]}) + "\n" for r in newest[1])
    )
    given = f"--config={ROOT / 'configs' / 'grpo.py'}:smoke"
    small = ["--config.rollout.max_steps=16", "--config.engine.lanes=4", "--config.engine.prefill_lanes=4"]
    own = ["--problems=problems.jsonl", "--temperature=1", "--rollouts=hf.jsonl", "--budget=3", "--max_tokens=60"]
    evaluate(home, "--checkpoint=hugging_face", given, *small, *own)
    threads = [json.loads(line) for line in (home / "hf.jsonl").read_text().splitlines()]
    texts = [[[call["text"] for call in record["calls"]] for record in records] for records in (threads, newest[1])]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.nlayers=3"], 'mean "num_layers"'),
        (["--config.model.num_kv_heads=2"], "must be a multiple of model.num_kv_heads=2"),
        (["--config=nope.py"], "nope.py"),
        (["--temperature=-1"], "temperature"),
        (["--split=train_me"], "split"),
        (["--problem=x"], "problem"),
        (["stray"], "unknown arguments: stray"),
        (["--method=cons@0:serial"], "NAME@N:METHOD"),
        (["--method=cons@4:adaptive", "--temperature=0"], "samples are all the same"),
        (["--method=cons@4:direct", "--budget=4"], "leave out the budget of 4"),
        (["--checkpoint=missing"], "no such folder"),
        (["--problems=broken.jsonl"], "broken.jsonl, line 2"),
        (["--checkpoint=runs/tiny", "--config.model.num_layers=3"], "contradicts the policy's weights"),
        (["--checkpoint=runs/tiny", "--num_problems=5"], "more than the 4 problems of test"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(home, arguments, message):
    (home / "broken.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n{"numbers": [1, 2]}\n')
    done = evaluate(home, *arguments, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_failures_exit_with_1_and_say_why(home, tmp_path):
    done = evaluate(home, f"--checkpoint={tmp_path}", check=1)
    assert "neither a run folder" in done.stderr
