"""docs/extending.md runs, section by section."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import apr_jax
from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.engine.threads import Path, RolloutKey
from apr_jax.files import read_jsonl
from apr_jax.kernels import ATTENTIONS, for_training
from apr_jax.model.families import FAMILIES
from apr_jax.model.params import init_params
from apr_jax.reasoning import METHODS
from apr_jax.tasks import TASKS
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.rules import Problem, verify
from apr_jax.tasks.dialect import ThreadDialect
from apr_jax.train.rl.objective import OBJECTIVES, choose_objective
from tests.docs.pages import run_page
from tests.reasoning.fixtures import SMALL, TOKENIZER, Replay, TextScript, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine
from tests.train.rl.test_objective import tokens_of
from tests.train.small import small_config, small_config_dict


@pytest.mark.heavy
def test_a_task(tmp_path, monkeypatch):
    small = small_config_dict(str(tmp_path / "data"))
    small.sft.num_steps, small.grpo.num_steps, small.evaluation.num_problems = 1, 1, 2
    monkeypatch.setattr("configs.grpo.get_config", lambda variant: small)
    monkeypatch.setitem(TASKS, "reversal", None)
    monkeypatch.chdir(tmp_path)
    page = run_page("extending.md", "A task")
    assert page["solution"].problem == "31415"
    assert page["solution"].record["method"] == "cons@4:direct"
    records = read_jsonl(tmp_path / "runs" / "reversal" / "metrics.jsonl")
    assert [record["phase"] for record in records] == ["sft", "grpo"]
    task, dialect = TASKS["reversal"], TASKS["reversal"].dialect("direct", ThreadDialect)
    (call,) = dialect.demonstrate("31415", None, None, None, budget=False)
    assert task.verify(dialect.read_ending(call.context + call.completion).answer, "31415").correct
    with pytest.raises(ValueError, match="'reversal' has no dialect for 'adaptive'"):
        apr_jax.load("runs/reversal").solve(["31415"], method="adaptive")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Run the section on methods beside a run with random weights, and return its names."""
    home = tmp_path_factory.mktemp("home")
    config = small_config(**{"data.directory": str(home / "data")})
    with Checkpoints(home / "runs" / "laptop", "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": init_params(config.model, 0)}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setitem(METHODS, "insist", None)
        yield run_page("extending.md", "A method")


def insist(page, problem, complete):
    (rollout,) = ScriptedEngine(complete).run([(RolloutKey(0, 0), page["insist"](problem, settings()))])
    return rollout


def test_a_method(page):
    assert page["solutions"][0].record["method"] == "insist"
    assert len(page["problems"]) == 4
    assert sum(len(tokens) for tokens in page["written"][0]) > 0


def test_where_the_parent_does_not_give_up_it_is_adaptive(page):
    demos = [demo for demo in demonstrations(SMALL, "adaptive", 30) if demo.correct]
    assert demos
    for demo in demos:
        rollout = insist(page, demo.problem, Replay([demo]))
        assert rollout.result.answer == demo.answer
        assert rollout.result.num_children == sum(call.depth > 0 for call in demo.calls)


def test_a_parent_that_gives_up_is_told_to_go_on_from_its_root(page):
    demos = demonstrations(SMALL, "adaptive", 200)
    demo = next(d for d in demos if d.correct and sum(call.ends_in_spawn for call in d.calls) == 2)
    first, second, last = (call for call in demo.calls if call.depth == 0)
    header = ADAPTIVE.prompt(demo.problem)
    assert second.completion.startswith(header)
    children = [call for call in demo.calls if call.depth]
    spawned = [call.completion.count("<Start") for call in (first, second)]
    paths = [(spawn, child) for spawn, count in enumerate(spawned) for child in range(count)]
    script: dict[Path, list[str]] = {path: [call.completion] for path, call in zip(paths, children, strict=True)}
    # As demonstrated, but for giving up after the first join: the program writes the header in place of that.
    script[()] = [first.completion, trace.NO_SOLUTION, second.completion.removeprefix(header), last.completion]
    rollout = insist(page, demo.problem, TextScript(script))
    assert verify(rollout.result.answer, demo.problem).correct
    third = rollout.calls[2].context.tolist()
    assert TOKENIZER.decode(third) == second.context + header


def test_its_patience_ends(page):
    script = TextScript({(): [trace.NO_SOLUTION] * (page["PATIENCE"] + 1)})
    rollout = insist(page, Problem((2, 3), 5), script)
    assert (rollout.result.status, len(rollout.calls)) == ("no_solution", page["PATIENCE"] + 1)


def test_an_rl_objective(tmp_path, monkeypatch):
    small = small_config_dict(str(tmp_path / "data"))
    small.sft.num_steps, small.grpo.num_steps, small.evaluation.num_problems = 1, 1, 1
    monkeypatch.setattr("configs.grpo.get_config", lambda variant: small)
    monkeypatch.setattr("apr_jax.train.rl.objective.OBJECTIVES", OBJECTIVES.copy())
    monkeypatch.chdir(tmp_path)
    run_page("extending.md", "An RL objective")
    records = read_jsonl(tmp_path / "runs" / "rloo" / "metrics.jsonl")
    assert [record["phase"] for record in records] == ["sft", "grpo"]

    grpo = small_config(**{"grpo.objective": "rloo", "grpo.group_size": 3, "grpo.kl_coef": 0.0}).grpo
    rloo = choose_objective(grpo)
    assert rloo.advantages(grpo, [1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    tokens = tokens_of([[2.0, -1.0, 0.0]], [[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]])

    def loss(logprob_BT):
        return rloo.terms(grpo, dataclasses.replace(tokens, logprob_BT=logprob_BT)).loss

    value, grad = jax.value_and_grad(loss)(jnp.log(jnp.asarray([[0.5, 0.25, 0.0]])))
    np.testing.assert_allclose(value, -0.5 * (2 * np.log(0.5) - np.log(0.25)), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1.0, 0.5, 0.0]], rtol=1e-6)


def test_a_model_family(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "seed_oss", None)
    monkeypatch.chdir(tmp_path)
    page = run_page("extending.md", "A model family")
    values = json.loads((tmp_path / "seed" / "config.json").read_text())
    assert (values["model_type"], values["attention_bias"]) == ("seed_oss", True)
    assert "model.layers.1.self_attn.k_proj.bias" in load_file(tmp_path / "seed" / "model.safetensors")
    assert page["loaded"] == page["model"]
    same = jax.tree.map(np.array_equal, page["params"], init_params(page["model"], 0))
    assert all(jax.tree.leaves(same))


def test_a_kernel(monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "fused", None)
    page = run_page("extending.md", "A kernel")
    seen = page["ends"] > jnp.arange(48)[None]  # later queries see nothing: their outputs have no meaning
    assert float(jnp.max(jnp.where(seen[..., None, None], page["difference"], 0.0))) < 1e-5
    chosen = for_training(dataclasses.replace(small_config().model, attention="fused"), "cpu")
    assert chosen.attention is page["fused_attention"]
    assert chosen.takes_branches
