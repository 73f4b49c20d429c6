"""What is kept of a step for people: a group with a signal, each call with the advantage that it was trained with."""

import dataclasses
import json

import numpy as np

from apr_jax.evaluation.report.run_report import add_run_views
from apr_jax.evaluation.report.thread_view import ThreadViews
from apr_jax.train.metrics import MetricsWriter
from apr_jax.train.rl.kept_rollouts import kept_records
from apr_jax.train.rl.sample import Sample
from tests.train.rl.test_sequences import CONFIG, TOKENIZER, scored_rollouts, two_rollouts


def made_sample(advantages, shares=()):
    """Two groups of two rollouts."""
    scored = scored_rollouts(two_rollouts() * 2)
    scored = [dataclasses.replace(each, advantage=value) for each, value in zip(scored, advantages, strict=True)]
    if shares:
        scored = [dataclasses.replace(each, shares=own) for each, own in zip(scored, shares, strict=True)]
    return Sample(scored, scored, rounds=1, dropped=0)


def test_the_first_group_with_a_signal_is_kept():
    records = kept_records(made_sample([0.0, 0.0, 1.5, -1.5]), CONFIG, TOKENIZER)
    assert [[call["advantage"] for call in record["calls"]] for record in records] == [[1.5] * 3, [-1.5]]
    assert [(record["sample"], record["reward"]) for record in records] == [(0, 1.0), (1, 0.0)]
    without = kept_records(made_sample([0.0] * 4), CONFIG, TOKENIZER)
    assert [call["advantage"] for record in without for call in record["calls"]] == [0.0] * 4


def test_a_call_has_its_own_share():
    shares = (np.ones(3), np.ones(1), np.asarray([1.0, 0.0, 1.0]), np.ones(1))
    records = kept_records(made_sample([0.0, 0.0, 2.0, -2.0], shares), CONFIG, TOKENIZER)
    assert [call["advantage"] for call in records[0]["calls"]] == [2.0, 0.0, 2.0]


def test_the_report_shows_what_a_step_kept(tmp_path):
    for step in (2, 10):
        records = kept_records(made_sample([0.5, -0.5, 0.0, 0.0]), CONFIG, TOKENIZER)
        with MetricsWriter(tmp_path, "grpo", 0) as writer:
            writer.write_rollouts(step, records)
    data = add_run_views(ThreadViews(), tmp_path).data
    assert [r["label"] for r in data["rollouts"]] == ["GRPO step 2"] * 2 + ["GRPO step 10"] * 2
    assert data["rollouts"][1]["threads"][0]["calls"][0]["advantage"] == -0.5
    assert data["rollouts"][0]["key"] != data["rollouts"][1]["key"]  # samples of one problem
    (path, _) = sorted((tmp_path / "grpo_rollouts").iterdir())
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2
