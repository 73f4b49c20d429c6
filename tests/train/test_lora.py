"""LoRA: adapters alone are trained, as their definition says, and a run with them goes on and is read as any other."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.checkpoints.policy import load_adapters, load_policy
from apr_jax.checkpoints.trees import flatten
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.data.tokenizer import config_tokenizer
from apr_jax.evaluation.export import export_adapters
from apr_jax.files import read_jsonl
from apr_jax.model.lora import init_trained, make_merge, merge
from apr_jax.model.params import init_params
from apr_jax.model.placement import model_shardings, place_params
from apr_jax.model.weights.hf import load_hf, save_hf
from apr_jax.parallel.mesh import make_mesh
from apr_jax.stopping import StoppedError
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.run import train
from apr_jax.train.scorer import make_scorer, to_mesh
from apr_jax.train.sft import make_sft_step, normalise, train_sft, weighted_nll
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, open_phase, random_rows, small_config, small_config_dict
from tests.train.test_sft import Rows, StopAt

pytestmark = pytest.mark.heavy

LORA = {"lora.rank": 4, "lora.alpha": 8.0}
CONFIG = small_config(**LORA)
BASE = init_params(CONFIG.model, 3)
MESH = make_mesh(CONFIG.mesh)


def arrays(tree):
    return {name.removesuffix(".value"): np.asarray(leaf) for name, leaf in flatten(tree).items()}


def moved(seed=1):
    """Adapters whose B is not 0."""
    adapters = init_trained(CONFIG.model, CONFIG.lora, BASE, seed)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), adapters)


def test_adapters_begin_as_nothing_and_as_peft_draws_them():
    adapters = init_trained(CONFIG.model, CONFIG.lora, BASE, 0)
    assert len(adapters) == 7 * CONFIG.model.num_layers
    jax.tree.map(np.testing.assert_array_equal, merge(BASE, adapters, CONFIG.lora), BASE)
    for pair in adapters.values():
        bound = 1 / np.sqrt(pair["lora_a"].shape[0])
        assert 0.8 * bound < np.abs(pair["lora_a"]).max() <= bound
    other = init_trained(CONFIG.model, CONFIG.lora, BASE, 1)
    assert not np.array_equal(other["blocks.0.mlp.up"]["lora_a"], adapters["blocks.0.mlp.up"]["lora_a"])


def test_merged_weights_follow_the_definition_on_the_targets_alone():
    lora = dataclasses.replace(CONFIG.lora, targets=("q", "down"))
    adapters = {name: pair for name, pair in moved().items() if name.endswith(("query", "down"))}
    assert adapters.keys() == init_trained(CONFIG.model, lora, BASE, 0).keys()
    expected = arrays(BASE)
    for name, pair in adapters.items():
        expected[name] = expected[name] + 8.0 / 4 * np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"])
    actual = arrays(make_merge(MESH, CONFIG.model, lora)(BASE, adapters))
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-6, err_msg=name)


def test_gradients_are_those_of_the_weights_by_the_chain_rule():
    rows = random_rows(CONFIG.model.vocab_size, 64, 8)
    batch = to_mesh({**rows, "weights": normalise(rows["weights"])}, MESH)
    scorer = make_scorer(CONFIG.model, MESH, jax.nn.log_softmax)

    def loss(params):
        return weighted_nll(scorer(params, batch).logprob_BT, batch["weights"])

    adapters = moved()
    grads = jax.jit(jax.grad(lambda trained: loss(merge(BASE, trained, CONFIG.lora))))(adapters)
    whole = arrays(jax.jit(jax.grad(loss))(merge(BASE, adapters, CONFIG.lora)))
    for name, pair in adapters.items():
        a, b = np.asarray(pair["lora_a"]), np.asarray(pair["lora_b"])
        np.testing.assert_allclose(grads[name]["lora_a"], 2.0 * whole[name] @ b.T, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(grads[name]["lora_b"], 2.0 * a.T @ whole[name], atol=1e-6, err_msg=name)


def test_a_step_is_the_same_on_a_mesh():
    rows = {**(rows := next(Rows(CONFIG))), "weights": normalise(rows["weights"])}
    results = []
    for config in (CONFIG, on_mesh(CONFIG, data=2, fsdp=2)):
        mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.sft.optimizer, 10)
        step = make_sft_step(config.model, optimizer, lambda _: 0.0, mesh, config.lora)
        state = create_state(mesh, config.model, optimizer, BASE, 0, config.lora)
        state, metrics = step(state, to_mesh(rows, mesh, 1), place_params(BASE, mesh, config.model))
        policy = make_merge(mesh, config.model, config.lora)(place_params(BASE, mesh, config.model), state.params)
        assert jax.tree.map(lambda x: x.sharding, policy) == model_shardings(mesh, config.model)
        results.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(*results, rtol=1e-5)


def sft(workdir, stop=None, rows=None):
    held_out = random_rows(CONFIG.model.vocab_size, CONFIG.sft.row_len, 6, seed=10**6)
    with open_phase(workdir, "sft", CONFIG, stop) as phase:
        how = {"rows": rows or Rows(CONFIG), "validation_rows": held_out, "seed": 0, "params": BASE}
        return train_sft(CONFIG.sft, CONFIG.model, MESH, phase, **how, lora=CONFIG.lora)


def test_sft_moves_the_targets_alone_and_resumed_equals_uninterrupted(tmp_path):
    before = arrays(BASE)
    expected = sft(tmp_path / "whole")
    rows = Rows(CONFIG)
    with pytest.raises(StoppedError):
        sft(tmp_path / "parts", StopAt(rows, 3), rows)
    actual = sft(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    adapted = init_trained(CONFIG.model, CONFIG.lora, BASE, 0).keys()
    for name, value in arrays(expected).items():
        assert np.array_equal(value, before[name]) == (name not in adapted), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of SFT and GRPO with adapters of a pretrained policy: its folder, and the policy's."""
    folder = tmp_path_factory.mktemp("lora")
    save_hf(folder / "pretrained", CONFIG.model, BASE, config_tokenizer(CONFIG))
    train(run_config(folder), folder / "run", start=folder / "pretrained")
    return folder


def run_config(folder, **overrides):
    values = small_config_dict(str(folder / "data"))
    more = {
        "sft.num_steps": 2,
        "grpo.num_steps": 2,
        "grpo.checkpoint_every": 1,
        "grpo.kl_coef": 0.1,
        "grpo.reward.token_price": 0.01,
    }
    values.update_from_flattened_dict({**LORA, **more, **overrides})
    return from_config_dict(values)


def test_a_checkpoint_of_adapters_is_read_as_the_merged_policy(run):
    sft_policy = load_policy(run / "run/checkpoints/sft/2")[1]
    reference = load_policy(run / "run/checkpoints/sft")[1]
    jax.tree.map(np.testing.assert_array_equal, sft_policy, reference)
    folder, lora, adapters = load_adapters(run / "run")
    assert folder == run / "run/checkpoints/grpo/2"
    assert lora == run_config(run).lora
    grpo_policy = load_policy(run / "run")[1]
    for (name, value), there in zip(arrays(grpo_policy).items(), arrays(sft_policy).values(), strict=True):
        if name not in adapters:
            np.testing.assert_array_equal(value, there)
        else:
            pair = adapters[name]
            np.testing.assert_allclose(value, there + 2.0 * pair["lora_a"] @ pair["lora_b"], atol=1e-6)
    weights = sum(x.size for x in jax.tree.leaves(grpo_policy))
    assert sum(x.size for x in jax.tree.leaves(adapters)) < weights


def test_grpo_goes_on_after_a_kill_as_if_nothing_had_happened(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/grpo/2")
    for left in ("summary.json", "evaluations/after.json"):
        (tmp_path / "run" / left).unlink(missing_ok=True)
    assert [each.name for each in (tmp_path / "run/checkpoints/grpo").glob("[0-9]*")] == ["1"]
    train(run_config(run), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run / "run/metrics.jsonl").read_bytes()
    one, other = (load_adapters(folder / "run/checkpoints/grpo/2")[2] for folder in (run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_finished_phase_goes_on_without_the_flag(run):
    values = run_config(run, **{"grpo.num_steps": 3})
    train(values, run / "run")
    steps = [(record["phase"], record["step"]) for record in read_jsonl(run / "run/metrics.jsonl")]
    assert steps == [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2), ("grpo", 3)]


@pytest.mark.parametrize("rank", [0, 4])
def test_sft_goes_on_without_the_flag(rank, run, tmp_path):
    how = {"lora.rank": rank, "sft.optimizer.schedule": "constant", "grpo.num_steps": 0}
    train(run_config(run, **how), tmp_path / "run", start=run / "pretrained")
    train(run_config(run, **how, **{"sft.num_steps": 3}), tmp_path / "run")
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["step"] == 3


def test_a_base_that_is_gone_is_named(run, tmp_path):
    base = run / "run/checkpoints/base"
    base.rename(tmp_path / "base")
    try:
        with pytest.raises(CheckpointError, match=f"its adapters belong to {base}, which is missing"):
            load_policy(run / "run/checkpoints/sft/2")
    finally:
        (tmp_path / "base").rename(base)


def test_adapters_leave_as_peft_has_them(run, tmp_path):
    note = export_adapters(run / "run/checkpoints/sft/2", tmp_path / "adapter")
    assert str(run / "pretrained") in note
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == 4
    assert settings["lora_alpha"] == 8.0
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert settings["base_model_name_or_path"] == str(run / "pretrained")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    model = CONFIG.model
    for module, inputs, outputs in (("mlp.down_proj", model.mlp_dim, model.embed_dim), ("self_attn.k_proj", 32, 16)):
        name = f"base_model.model.model.layers.0.{module}"
        assert tensors[f"{name}.lora_A.weight"].shape == (4, inputs)
        assert tensors[f"{name}.lora_B.weight"].shape == (outputs, 4)
    assert len(tensors) == 2 * 7 * model.num_layers
    assert load_hf(run / "pretrained")[0].num_layers == model.num_layers
    with pytest.raises(ConfigError, match="there are no adapters"):
        export_adapters(run / "pretrained", tmp_path / "none")


def test_fresh_weights_have_nothing_to_adapt(run, tmp_path):
    with pytest.raises(ConfigError, match=r"lora.rank=4: fresh weights .* --start or --checkpoint"):
        train(run_config(run), tmp_path / "fresh")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 17}, "lora.rank=17 is more than the rank of the matrix k, which is at most 16"),
        ({"lora.rank": 33, "lora.targets": ("up",)}, "matrix up, which is at most 32"),
        ({"lora.rank": -1}, "lora.rank=-1"),
        ({"lora.targets": ("q", "query")}, r"lora.targets\[1\]='query': choose one of 'q', 'k'"),
        ({"lora.rank": 2, "lora.targets": ()}, "name at least one"),
        ({"lora.rank": 2, "lora.targets": ("q", "q")}, "none twice"),
        ({"lora.rank": 2, "lora.alpha": 0.0}, "alpha must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)
