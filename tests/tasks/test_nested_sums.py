"""Nested sums: problems, dialect, and everything that takes a task: training, evaluation, samples, the library."""

import dataclasses
import json
import random

import pytest

from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.demonstrations import load_split
from apr_jax.engine.threads import RolloutKey
from apr_jax.evaluation.run import evaluate
from apr_jax.library import Policy
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.base import Sample
from apr_jax.reasoning.sampling import majority
from apr_jax.tasks import nested_sums as sums
from apr_jax.tasks.base import TaskLacksError
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END
from apr_jax.tasks.generation import demonstrate, generate_problems
from apr_jax.tasks.nested_sums import NESTED_SUMS, NestedSumsConfig
from apr_jax.train.rl.sample import score
from apr_jax.train.run import train
from configs.nested_sums import get_config
from tests.reasoning.fixtures import TOKENIZER, Replay, TextScript, call_tokens, settings
from tests.reasoning.scripted_engine import ScriptedEngine

SETTINGS = settings(task=NESTED_SUMS, max_depth=2, max_children=2, max_spawns=1)


def tiny_config(folder):
    values = get_config()
    values.model.update(num_layers=1, embed_dim=32, mlp_dim=64, num_heads=1, num_kv_heads=1, head_dim=32)
    values.mesh.data = 1
    values.data.update(directory=str(folder), num_train=16, num_validation=4, num_test=4, num_test_unseen_targets=4)
    values.sft.update(num_steps=2, rows_per_step=4, checkpoint_every=2, validate_every=2, validation_rows=4)
    values.sft.optimizer.update(name="adamw", warmup_steps=1)
    values.engine.update(lanes=8, pages=64, prefill_lanes=8)
    values.rollout.max_steps = 16
    values.grpo.update(num_steps=1, prompts_per_step=2, group_size=2, checkpoint_every=1, rows_per_microbatch=4)
    values.grpo.update(validate_every=1, validation_problems=4)
    values.evaluation.num_problems = 4
    return from_config_dict(values)


def solution(problem):
    return demonstrate(problem, random.Random(0), NestedSumsConfig(name="nested_sums", depth=3), "adaptive", False)


def solve(problem, complete):
    (rollout,) = ScriptedEngine(complete).run([(RolloutKey(0, 0), adaptive(problem, SETTINGS))])
    return rollout


def test_an_expression_is_read_as_it_is_written():
    rng = random.Random(0)
    for _ in range(200):
        problem = sums.sample(rng, 3)
        assert sums.read_sum(str(problem)) == problem
    assert sums.read_sum("[[3+4]*5]-[2*8]").value == (7 * 5 - 16) % 10


@pytest.mark.parametrize(
    "text", ["", "3", "3+", "+3", "3+4+5", "[3+4]", "[3+4", "3+4]", "12+3", "3/4", "3+[4]", "]3+4[", "[" * 300]
)
def test_what_is_no_expression_is_none(text):
    assert sums.read_sum(text) is None


def test_the_program_rebuilds_demonstrations_token_by_token():
    rng = random.Random(1)
    for _ in range(50):
        demo = solution(sums.sample(rng, 3))
        rollout = solve(demo.problem, Replay([demo]))
        assert NESTED_SUMS.verify(rollout.result.answer, demo.problem).correct
        assert rollout.result.num_children == sum(call.depth > 0 and not call.ends_in_spawn for call in demo.calls)
        assert rollout.generated_tokens == sum(len(call_tokens(call)[1]) for call in demo.calls)


def test_the_longest_chain_grows_with_depth_and_not_with_size():
    bracket = sums.Sum(1, "+", 2)
    one, both = sums.Sum(bracket, "*", 3), sums.Sum(bracket, "*", bracket)
    chains = [solve(problem, Replay([solution(problem)])).sequential_tokens for problem in (one, both)]
    assert chains[1] - chains[0] == len(TOKENIZER.encode("1+2=\n"))  # to ask for one child more, and not its own tokens


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (f"{CALL_BEGIN}{CALL_END}", "malformed_spawn"),
        (f"{CALL_BEGIN}1+2\n{CALL_END}", "malformed_spawn"),
        (f"{CALL_BEGIN}1+=\n{CALL_END}", "malformed_spawn"),
        (f"{CALL_BEGIN}1+2=\n1+2=\n1+2=\n{CALL_END}", "too_many_children"),
        ("1+2=3", "unfinished"),
        ("\n", "unfinished"),
    ],
)
def test_malformed_text_has_a_reason(written, reason):
    rollout = solve(sums.Sum(1, "+", 2), TextScript({(): [written]}))
    assert (rollout.result.answer, rollout.result.status, rollout.result.reason) == (None, "malformed", reason)


def test_threads_nest_no_deeper_than_allowed():
    spawn = f"{CALL_BEGIN}1+2=\n{CALL_END}"
    script = {(): [spawn, "1+2=3\n"], (0, 0): [spawn, "1+2=3\n"], (0, 0, 0, 0): [spawn]}
    rollout = solve(sums.Sum(1, "+", 2), TextScript(script))
    assert (rollout.result.answer, rollout.result.child_reasons) == ("3", ("too_deep",))


def test_splits_share_no_problem_and_are_reproducible(tmp_path):
    config = tiny_config(tmp_path)
    splits = [load_split(config, split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [16, 4, 4]
    problems = [{str(demo.problem) for demo in split} for split in splits]
    assert not problems[0] & problems[1]
    assert not problems[0] & problems[2]
    assert [demo.problem for demo in splits[0]] == list(generate_problems(config, "train"))


def test_what_it_lacks_is_named(tmp_path):
    config = tiny_config(tmp_path)
    rollout = solve(sums.read_sum("[1+2]*3"), Replay([solution(sums.read_sum("[1+2]*3"))]))
    grpo = dataclasses.replace(config.grpo, credit="used", group_size=2)
    with pytest.raises(TaskLacksError, match="'nested_sums' do not repeat what children hand back"):
        score(grpo, [rollout, rollout], [sums.read_sum("[1+2]*3")] * 2, TOKENIZER, NESTED_SUMS)
    for section, changes, message in (
        ("data", {"method": "serial"}, "'nested_sums' has no dialect for 'serial'; it has one for adaptive"),
        ("rollout", {"constrain_spawns": True}, "'nested_sums' for 'adaptive' is no SpelledSpawnDialect"),
    ):
        values = to_dict(config)
        values[section] |= changes
        with pytest.raises(TaskLacksError, match=message):
            from_config_dict(values)


PROBLEMS = ["[1+2]*3", "4*5", "[[3+4]*5]-[2*8]"]


def imitator():
    return ScriptedEngine(Replay([solution(sums.read_sum(text)) for text in PROBLEMS]))


@pytest.mark.parametrize("method", ["adaptive", "cons@4:adaptive", "best@4:adaptive", "pass@2:adaptive"])
def test_samples_vote_rank_and_are_verified(method):
    problems = [sums.read_sum(text) for text in PROBLEMS]
    summary, records = evaluate(imitator(), problems, method=method, settings=SETTINGS, seed=0, temperature=1.0)
    assert summary["accuracy"] == 1.0
    assert [record["title"] for record in records] == PROBLEMS
    assert records[2]["operations"] == records[2]["operations_right"] >= 4
    if method != "adaptive":
        assert summary["pass_at_k"][0] == summary["cons_at_k"][-1] == summary["best_at_k"][-1] == 1.0
    children = [thread["result"] for thread in records[2]["threads"] if len(thread["path"]) > 2]
    assert children
    assert set(children) == {"solved"}


def test_answers_vote_as_they_are():
    samples = [Sample(answer=answer, status="answered", reason="", mean_logprob=0.0) for answer in "1323"]
    assert majority(samples, sums.read_sum("1+2"), NESTED_SUMS) == 1


def test_the_library_solves_it(tmp_path):
    class Imitator(Policy):
        def engine_for(self, method):
            class Engine(ScriptedEngine):
                def run(self, programs, *, observer=None, **how):
                    return super().run(programs, **how)

            return Engine(Replay([solution(sums.read_sum(text)) for text in PROBLEMS]))

    solutions = Imitator(tiny_config(tmp_path), TOKENIZER, {}).solve(PROBLEMS)
    assert [(s.solved, s.expression) for s in solutions] == [(True, "9"), (True, "0"), (True, "9")]
    with pytest.raises(ValueError, match="is no sum of digits"):
        Imitator(tiny_config(tmp_path), TOKENIZER, {}).solve(["1+"])


@pytest.mark.heavy
def test_the_projects_own_trainer_runs_it_from_data_to_report(tmp_path):
    summary = train(tiny_config(tmp_path / "data"), tmp_path / "run")
    assert summary["before"]["num_problems"] == summary["after"]["num_problems"] == 4
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["phase"], record["step"]) for record in metrics] == [("sft", 1), ("sft", 2), ("grpo", 1)]
    problem = load_split(tiny_config(tmp_path / "data"), "test")[0]
    assert str(problem.problem) in (tmp_path / "run" / "report.html").read_text()
