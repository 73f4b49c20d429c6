"""Evaluation end to end on a scripted engine, problem files, and the choice of run and configuration."""

import dataclasses
import json
import os

import pytest
from ml_collections import ConfigDict

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.demonstrations import load_split
from apr_jax.engine.threads import Progress
from apr_jax.evaluation.policy import check_vocabulary, choose_config
from apr_jax.evaluation.rollout_sources import ProblemFileError, newest_run, read_problems
from apr_jax.evaluation.run import (
    evaluate,
    load_problems,
    save_rollouts,
    show_summary,
)
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.dialect import demonstrated_tokens
from configs.grpo import get_config
from tests.reasoning.fixtures import SMALL, TOKENIZER, Replay, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine

INTERFACE_KEYS = [
    *("accuracy", "accuracy_low", "accuracy_high", "num_problems", "total_tokens", "sequential_tokens"),
    *("tokens_per_call", "children_per_rollout", "children_per_spawn", "malformed_rate", "truncated_rate"),
    *("latency_ms", "tokens_per_second", "generated_tokens", "prefilled_tokens", "peak_context", "flops"),
]


@pytest.mark.parametrize("method", ["adaptive", "direct", "serial"])
def test_evaluating_a_perfect_imitator_gives_the_solvers_figures(method):
    demos = list(demonstrations(SMALL, method, 30))
    summary, records = evaluate(
        ScriptedEngine(Replay(demos)),
        [demo.problem for demo in demos],
        method=method,
        settings=settings(),
        seed=0,
        temperature=0.0,
        keep_calls=3,
    )
    assert set(INTERFACE_KEYS) <= set(summary)
    assert all(isinstance(summary[key], int | float) for key in INTERFACE_KEYS)
    assert summary["accuracy"] == sum(demo.correct for demo in demos) / 30
    assert summary["num_problems"] == 30
    assert summary["operations_right_rate"] == 1.0
    assert summary["malformed_rate"] == summary["truncated_rate"] == summary["child_failure_rate"] == 0.0
    children = sum(call.depth > 0 for demo in demos for call in demo.calls)
    assert summary["children_per_rollout"] == children / 30
    written = sum(len(TOKENIZER.encode(c.completion)) + (not c.ends_in_spawn) for demo in demos for c in demo.calls)
    assert summary["total_tokens"] == written / 30
    dialect = COUNTDOWN.dialects[method]
    counted = [demonstrated_tokens(dialect, demo, lambda text: len(TOKENIZER.encode(text))) for demo in demos]
    keys = ("sequential_tokens", "total_tokens", "peak_context")
    assert [tuple(record[key] for key in keys) for record in records] == counted
    assert [record["correct"] for record in records] == [demo.correct for demo in demos]
    assert [("calls" in record) for record in records] == [True] * 3 + [False] * 27
    json.dumps([summary, records])
    assert "solved" in show_summary(summary)


class CountsRuns(ScriptedEngine):
    """Notes the problems of each run, and tells of one finished rollout at its end."""

    def run(self, programs, *, on_progress=None, **how):
        self.runs = [*getattr(self, "runs", ()), [key.problem for key, _ in programs]]
        rollouts = super().run(programs, **how)
        if on_progress is not None:
            tokens = sum(rollout.generated_tokens for rollout in rollouts)
            on_progress(Progress(len(rollouts), len(programs), tokens, 0.0))
        return rollouts


@pytest.mark.parametrize(
    ("at_once", "runs"), [(None, [[0, 1, 2, 3, 4]]), (2, [[0, 1], [2, 3], [4]]), (9, [[0, 1, 2, 3, 4]])]
)
def test_so_many_problems_are_decoded_at_once_and_progress_goes_on(at_once, runs):
    demos = list(demonstrations(SMALL, "adaptive", 5))
    engine, told = CountsRuns(Replay(demos)), []
    problems, how = [demo.problem for demo in demos], {"settings": settings(), "seed": 0, "temperature": 0.0}
    summary, records = evaluate(engine, problems, method="adaptive", at_once=at_once, on_progress=told.append, **how)
    assert engine.runs == runs
    assert [now.finished for now in told] == [part[-1] + 1 for part in runs]
    assert [now.total for now in told] == [5] * len(runs)
    assert told[-1].generated_tokens == summary["generated_tokens"] * 5
    alone = [{k: v for k, v in record.items() if k != "latency_ms"} for record in records]
    _, expected = evaluate(ScriptedEngine(Replay(demos)), problems, method="adaptive", **how)
    assert alone == [{k: v for k, v in record.items() if k != "latency_ms"} for record in expected]


def test_evaluating_nothing_is_refused():
    with pytest.raises(ValueError, match="no problems"):
        evaluate(ScriptedEngine(Replay([])), [], method="serial", settings=settings(), seed=0, temperature=0.0)


def test_several_samples_at_temperature_0_are_refused():
    engine, how = ScriptedEngine(Replay([])), {"settings": settings(), "seed": 0, "temperature": 0.0}
    with pytest.raises(ValueError, match="samples are all the same"):
        evaluate(engine, [Problem((2, 3), 5)], method="cons@8:serial", **how)


def test_samples_are_shown_beside_one_alone():
    figures = {"accuracy": 0.6, "pass_at_k": [0.25, 0.75], "cons_at_k": [0.25, 0.5], "best_at_k": [0.25, 0.375]}
    demos = list(demonstrations(SMALL, "serial", 2))
    problems = [demo.problem for demo in demos]
    how = {"method": "serial", "settings": settings(), "seed": 0, "temperature": 0.0}
    summary, _ = evaluate(ScriptedEngine(Replay(demos)), problems, **how)
    assert "samples " not in show_summary(summary)
    shown = show_summary(summary | figures).splitlines()[-1]
    assert shown == (
        "samples         2: one alone is right in 25.0 % of problems, the majority in 50.0 %, the likeliest in 37.5 %, "
        "any in 75.0 %"
    )


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"numbers": [3, 7, 12], "target": 40}\n\n{"numbers": [1, 2], "target": 3, "note": "easy"}\n')
    assert read_problems(COUNTDOWN, path) == [Problem((3, 7, 12), 40), Problem((1, 2), 3)]
    assert read_problems(COUNTDOWN, path, limit=1) == [Problem((3, 7, 12), 40)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "no object with numbers and target"),
        ('{"numbers": [1, 2]}', "no object with numbers and target"),
        ('{"numbers": "12", "target": 3}', "not a list"),
        ('{"numbers": [1], "target": 3}', "at least 2 numbers"),
        ('{"numbers": [1, 2.5], "target": 3}', "tuple of ints"),
        ('{"numbers": [1, -2], "target": 3}', "negative"),
        ('{"numbers": [1, 2], "target": "3"}', "positive int"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"numbers": [1, 2], "target": 3}\n' + line + "\n")
    with pytest.raises(ProblemFileError, match="line 2.*" + message):
        read_problems(COUNTDOWN, path)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_missing_or_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "problems.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ProblemFileError, match=r"problems\.jsonl"):
        read_problems(COUNTDOWN, path)


def test_problems_of_a_split(tmp_path):
    values = get_config("smoke")
    values.data.update(directory=str(tmp_path), num_train=8, num_validation=6, num_test=5, num_test_unseen_targets=4)
    values.grpo.validation_problems = 6
    values.data.num_workers = 1
    config = from_config_dict(values)
    assert load_problems(config, "test", 3) == load_problems(config, "test", 5)[:3]
    assert load_problems(config, "validation", 3) != load_problems(config, "test", 3)
    with pytest.raises(ConfigError, match="num_problems=6 is more than the 5 problems of test"):
        load_problems(config, "test", 6)
    assert not list(tmp_path.iterdir())  # problems need no demonstrations
    assert load_problems(config, "test", 5) == [demonstration.problem for demonstration in load_split(config, "test")]


def test_saved_rollouts_are_those_with_calls(tmp_path):
    records = [{"problem": 0, "calls": []}, {"problem": 1}]
    save_rollouts(tmp_path / "rollouts.jsonl", {"before": records, "after": records[:1]})
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["label"], line["problem"]) for line in lines] == [("before", 0), ("after", 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_newest_run_is_the_one_written_last(tmp_path):
    assert newest_run(tmp_path) is None
    for age, name in ((50, "old"), (10, "new"), (30, "middle")):
        folder = tmp_path / name / "checkpoints" / "sft" / "10"
        folder.mkdir(parents=True)
        for path in (folder, folder.parent, folder.parent.parent):
            os.utime(path, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "data").mkdir()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert newest_run(tmp_path).name == "new"


def test_a_policy_brings_its_configuration():
    saved = to_dict(from_config_dict(get_config("smoke")))
    model = from_config_dict(get_config("smoke")).model
    assert choose_config(model, saved, None, {}) == from_config_dict(saved)
    changed = choose_config(model, saved, None, {"engine.lanes": 16, "evaluation.temperature": 0.5, "seed": 3})
    assert (changed.engine.lanes, changed.evaluation.temperature, changed.seed) == (16, 0.5, 3)
    given = choose_config(model, saved, get_config("laptop"), {})
    assert given.name == "laptop"
    assert given.model == model


def test_overrides_may_not_contradict_the_weights():
    saved = to_dict(from_config_dict(get_config("smoke")))
    model = from_config_dict(get_config("smoke")).model
    with pytest.raises(ConfigError, match=r"model\.num_layers=3 contradicts .*, which have 2"):
        choose_config(model, saved, None, {"model.num_layers": 3})
    assert choose_config(model, saved, None, {"model.num_layers": 2}).model == model
    longer = choose_config(model, saved, None, {"model.max_seq_len": 1024, "model.compute_dtype": "bfloat16"})
    assert (longer.model.max_seq_len, longer.model.compute_dtype) == (1024, "bfloat16")


def test_a_configuration_of_another_version_is_named_with_what_takes_its_place():
    saved = to_dict(from_config_dict(get_config("smoke")))
    model = from_config_dict(get_config("smoke")).model
    del saved["engine"]
    saved["rollout"] |= {"num_lanes": 16, "num_pages": 512}  # before sizes had a section of their own
    with pytest.raises(ConfigError, match=r"another version \(engine: missing.*--config=configs/grpo\.py"):
        choose_config(model, saved, None, {})
    assert choose_config(model, saved, get_config("smoke"), {}).name == "smoke"


def test_a_policy_without_configuration_needs_one():
    model = dataclasses.replace(from_config_dict(get_config()).model, max_seq_len=1024)
    with pytest.raises(ConfigError, match="--config=FILE"):
        choose_config(model, None, None, {})
    assert choose_config(model, None, get_config(), {}).model == model
    assert isinstance(get_config(), ConfigDict)


def test_a_vocabulary_that_is_too_small_is_refused():
    model = from_config_dict(get_config()).model
    check_vocabulary(model, TOKENIZER)
    with pytest.raises(ConfigError, match=f"vocab_size=100 .* {TOKENIZER.vocab_size} ids"):
        check_vocabulary(dataclasses.replace(model, vocab_size=100), TOKENIZER)


def test_a_policy_decodes_on_the_devices_that_there_are():
    trained = get_config("smoke")
    for mesh, here in (((8, 1), (-1, 1)), ((1, 4), (-1, 1)), ((-1, 2), (-1, 1)), ((1, 1), (1, 1))):
        trained.mesh.data, trained.mesh.fsdp = mesh
        trained.grpo.rows_per_microbatch = 8
        config = from_config_dict(trained)
        chosen = choose_config(config.model, to_dict(config), None, {}).mesh
        assert (chosen.data, chosen.fsdp) == here
        assert choose_config(config.model, to_dict(config), None, {"mesh.data": 2}).mesh.data == 2
        assert choose_config(config.model, to_dict(config), trained, {}).mesh == config.mesh
