"""launch/probe_arithmetic.py as a user runs it, on a run of Countdown and of another task."""

import dataclasses
import json

import pytest

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.config_dict import from_config_dict
from apr_jax.model.params import init_params
from configs import nested_sums
from tests.launch.test_evaluate import launched, small_config

pytestmark = pytest.mark.heavy


def save_policy(run, config):
    """A policy whose threads hold whole demonstrations."""
    model = dataclasses.replace(config.model, max_seq_len=512)
    config = dataclasses.replace(config, model=model, engine=dataclasses.replace(config.engine, pages=64))
    with Checkpoints(run, "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": init_params(config.model, 0)}, {})


def test_the_shares_add_up_and_another_task_is_refused(tmp_path):
    save_policy(tmp_path / "countdown", small_config(tmp_path))
    arguments = ("--num_problems=2", "--json=shares.json")
    done = launched("probe_arithmetic.py", tmp_path, "--checkpoint=countdown", *arguments)
    probe = json.loads((tmp_path / "shares.json").read_text())
    shares, tokens = probe["results"], probe["tokens"]
    operators = [share for label, share in shares.items() if len(label) == 1]
    assert shares["all"]["total"] == sum(share["total"] for share in operators) > 0
    assert f"of {shares['all']['total']:,}" in done.stdout
    writers = {label.partition(",")[0] for label in tokens}
    assert writers == {"parent", "child", "parent replay", "child replay"}
    assert tokens["child, result"]["total"] > tokens["child replay, result"]["total"] > 0

    other = dataclasses.replace(small_config(tmp_path), task=from_config_dict(nested_sums.get_config()).task)
    save_policy(tmp_path / "sums", other)
    done = launched("probe_arithmetic.py", tmp_path, "--checkpoint=sums", *arguments, check=2)
    assert "task.name='nested_sums': the probe reads Countdown's operations" in done.stderr
