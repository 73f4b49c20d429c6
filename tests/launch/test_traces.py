"""A user's session: a model from elsewhere, a JSONL of traces and a config. No program is told the model's shape."""

import dataclasses
import json
from typing import Any

import pytest

from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.evaluation.compare.store import read_results
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from tests.data.made_tokenizers import byte_level_json
from tests.launch.test_evaluate import launched, small_config
from tests.tasks.test_traces import LINE, PLAIN

pytestmark = pytest.mark.heavy

CONFIG = """
from configs import traces

def get_config(variant="mine.jsonl"):
    config = traces.get_config(variant)
    config.model.max_seq_len = config.sft.row_len = config.grpo.row_len = config.rollout.max_steps = 128
    config.data.update(directory="data", num_train=16, num_validation=4, num_test=4, num_test_unseen_targets=4)
    config.sft.update(num_steps=2, rows_per_step=2, microbatches=1, validation_rows=2)
    config.engine.update(lanes=4, pages=48)
    config.rollout.max_steps = 24
    config.grpo.update(num_steps=1, prompts_per_step=2, group_size=2, validation_problems=4)
    config.evaluation.num_problems = 4
    return config
"""
SMALL = "--config=small.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a pretrained policy, traces, a config, and what training made of the three."""
    home = tmp_path_factory.mktemp("home")
    (home / "model").mkdir()
    lines: list[dict[str, Any]] = [*PLAIN, LINE]
    (home / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "small.py").write_text(CONFIG)
    path = byte_level_json(home / "model", [line["prompt"] for line in lines], ["<s>", "</s>"])
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = load_tokenizer(str(path), Spelling(encoding="whole"))
    model = dataclasses.replace(small_config(home).model, vocab_size=tokenizer.vocab_size, max_seq_len=96)
    save_hf(home / "model", model, init_params(model, 1), tokenizer)
    done = launched("train.py", home, SMALL, "--start=model", "--workdir=run")
    assert "model.max_seq_len=128 is more than the 96 tokens of context" in done.stderr
    return home


def test_a_run_has_all_stages_and_its_page_can_be_drawn_again(home):
    phases = [json.loads(line)["phase"] for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["sft", "sft", "grpo"]
    assert {"before", "after"} <= set(json.loads((home / "run" / "summary.json").read_text()))
    (home / "run" / "report.html").unlink()
    assert launched("report.py", home, "--run=run").stdout.strip() == "run/report.html"
    assert "What is " in (home / "run" / "report.html").read_text()


def test_a_policy_is_evaluated_under_a_configuration_that_takes_its_shape(home):
    launched("evaluate.py", home, "--checkpoint=model", SMALL, "--json=figures.json")
    figures = json.loads((home / "figures.json").read_text())
    assert figures["num_problems"] == 4
    assert 0 < figures["total_tokens"] <= 24


def test_solve_and_generate_take_the_models_shape(home):
    policy = ("--checkpoint=model", SMALL, "--json=-")
    assert json.loads(launched("solve.py", home, "What is 2+1? => 3", *policy).stdout)["solved"] is False
    written = launched("generate.py", home, "Hello", "--max_tokens=4", *policy)
    assert json.loads(written.stdout)["samples"][0]["tokens"] <= 4


def test_policies_are_compared_under_a_configuration_that_takes_their_shapes(home):
    (home / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PLAIN[:3]))
    arguments = ("--policies=start=model,trained=run", SMALL, "--problems=own.jsonl", "--workdir=comparison")
    launched("compare.py", home, *arguments)
    assert [row["policy"] for row in read_results(home / "comparison")] == ["start", "trained"]
    launched("report.py", home, "--comparison=comparison", "--run=run")
    assert "trained" in (home / "comparison" / "report.html").read_text()


def test_decoding_of_a_model_is_measured(home):
    arguments = ("--checkpoint=model", SMALL, "--lanes=1", "--prompt=8", "--new=64", "--json=speed.json")
    launched("benchmark_decode.py", home, *arguments)
    assert json.loads((home / "speed.json").read_text())["lanes"]["1"]["tokens_per_second"] > 0


def test_what_takes_a_models_shape_needs_a_model(home):
    refused = launched("benchmark_decode.py", home, SMALL, check=2)
    assert "='auto' takes a policy's: name it with" in refused.stderr
    refused = launched("generate_data.py", home, SMALL, check=2)
    assert "model.family='auto' takes a policy's, and none is read here" in refused.stderr
