"""Tokenizer, method, task and model travel with a policy's weights; what disagrees is refused with both named."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apr_jax
from apr_jax.checkpoints.identity import find_policy, note_task, own_tokenizer, same_tokenizer, with_auto
from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.tokenizer import BuiltinTokenizer, load_tokenizer, tokenizer_digest
from apr_jax.evaluation.policy import configure
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.policies import SHIPPED
from apr_jax.train.origins import load_given
from configs.grpo import get_config
from tests.train.small import small_config

CONFIG = small_config()


def write_tokenizer(folder, *swapped):
    """The built-in vocabulary as a file, with two words exchanged."""
    BuiltinTokenizer().save(folder)
    path = folder / "tokenizer.json"
    if swapped:
        one, other = swapped
        values = json.loads(path.read_text())
        vocab = values["model"]["vocab"]
        vocab[one], vocab[other] = vocab[other], vocab[one]
        path.write_text(json.dumps(values))
    return str(path)


def write_run(folder, config=CONFIG, change=lambda params: params):
    with Checkpoints(folder, "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": change(init_params(config.model, 0))}, {})
        checkpoints.wait()
        checkpoints.score(1, 1.0)
    return folder


def with_fields(config=CONFIG, **fields):
    values = to_dict(config)
    for field, value in fields.items():
        section, _, name = field.replace("__", ".").partition(".")
        values[section][name] = value
    return from_config_dict(values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "builtin")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tokenizer that differs from the built-in one, and a run with it."""
    path = write_tokenizer(tmp_path_factory.mktemp("other"), "7", "8")
    return path, write_run(tmp_path_factory.mktemp("runs") / "other", with_fields(data__tokenizer=path))


@pytest.mark.parametrize("place", ["", "best", "checkpoints", "checkpoints/sft", "checkpoints/sft/1"])
def test_the_tokenizer_is_in_every_folder_that_holds_a_policy(place, other, tmp_path):
    path, run = other
    copy = shutil.copytree(run, tmp_path / "copy") / place
    own = own_tokenizer(copy, to_dict(with_fields(data__tokenizer=str(tmp_path / "gone.json"))))
    assert own is not None
    assert own.startswith(str(tmp_path / "copy"))
    assert same_tokenizer(own, path)
    assert not same_tokenizer(own, "builtin")
    assert tokenizer_digest(apr_jax.load(copy).tokenizer) == tokenizer_digest(load_tokenizer(path))


def test_the_built_in_one_stays_itself(run):
    assert own_tokenizer(run, to_dict(CONFIG)) == "builtin"
    assert isinstance(apr_jax.load(run).tokenizer, BuiltinTokenizer)


def test_a_checkpoint_of_before_they_travelled_goes_by_its_configuration(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    shutil.rmtree(old / "checkpoints" / "sft" / "1" / "tokenizer")
    (old / "checkpoints" / "sft" / "1" / "sums.json").unlink()
    assert own_tokenizer(old, find_policy(old).config) == "builtin"
    for phase in ("sft", "grpo"):
        load_given(phase, old, CONFIG)
    apr_jax.load(old)


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_a_run_begins_with_a_policy_of_its_own_tokenizer_only(phase, run, other, tmp_path):
    path, of_other = other
    same = write_tokenizer(tmp_path / "same")
    for folder, asked in ((run, "builtin"), (run, same), (of_other, path)):
        load_given(phase, folder, with_fields(data__tokenizer=asked))
    for folder, asked in ((run, path), (of_other, "builtin"), (of_other, same)):
        with pytest.raises(ConfigError, match=r"has the tokenizer .* is another; .*=auto takes") as refusal:
            load_given(phase, folder, with_fields(data__tokenizer=asked))
        assert asked in str(refusal.value)


@pytest.mark.parametrize("phase", ["sft", "grpo"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 2},
        {"embed_dim": 64, "mlp_dim": 128},
        {"rope_theta": 7.0},
        {"tie_embeddings": True},
        {"family": "qwen3"},
    ],
    ids=str,
)
def test_a_run_begins_with_a_policy_of_its_own_model_only(phase, changes, run):
    if changes == {"tie_embeddings": CONFIG.model.tie_embeddings}:
        changes = {"tie_embeddings": not CONFIG.model.tie_embeddings}
    config = with_fields(**{f"model__{name}": value for name, value in changes.items()})
    with pytest.raises(ConfigError, match="is another model:") as refusal:
        load_given(phase, run, config)
    for name, value in changes.items():
        assert f"model.{name}: {getattr(CONFIG.model, name)!r} there, {value!r} here" in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data__method", "serial"),
        ("data__method", "direct"),
        ("data__condition_on_budget", True),
        ("task__context_windows", [64, 128]),
    ],
)
def test_only_sft_may_teach_a_policy_to_read_otherwise(field, value, run):
    config = with_fields(**{field: value})
    load_given("sft", run, config)
    with pytest.raises(
        ConfigError, match=f"{run} was trained for something else:\n  {field.replace('__', '.')}: .* there"
    ):
        load_given("grpo", run, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("task__max_result", 50), ("task__max_number", 30), ("task__shuffle", True), ("sft__row_len", 256), ("seed", 3)],
)
def test_what_no_weight_means_may_differ_and_is_said_of_the_task(field, value, run, caplog):
    values = to_dict(CONFIG)
    section, _, name = field.partition("__")
    before = values[section][name] if name else None
    values[section] = {**values[section], name: value} if name else value
    for phase in ("sft", "grpo"):
        caplog.clear()
        load_given(phase, run, from_config_dict(values))
        said = [record.getMessage() for record in caplog.records if "settings of the task" in record.getMessage()]
        if section == "task":
            (message,) = said
            assert f"{run} was trained" in message
            assert message.count(" there, ") == 1
            assert f"task.{name}: {before!r} there, {value!r} here" in message
        else:
            assert not said


def test_settings_of_another_task_are_not_compared(caplog):
    note_task(pathlib.Path("run"), {"task": {"name": "a", "depth": 1}}, {"task": {"name": "b", "depth": 2}})
    note_task(pathlib.Path("run"), None, {"task": {"name": "b", "depth": 2}})
    note_task(
        pathlib.Path("run"), {"task": {"name": "b", "beams": [2]}}, {"task": {"name": "b", "beams": (2,), "new": 1}}
    )
    assert not caplog.records


def test_a_method_is_taken_where_the_configuration_says_auto(run, other):
    path, of_other = other
    trained = with_fields(data__tokenizer=path)
    values = get_config("smoke").to_dict()
    for section, name in (("data", "tokenizer"), ("data", "method"), ("task", "name"), ("model", "family")):
        values[section][name] = "auto"
    config = from_config_dict(with_auto(values, of_other))
    assert (config.data.method, config.task) == (trained.data.method, trained.task)
    assert same_tokenizer(config.data.tokenizer, path)
    load_given("grpo", of_other, config)
    with pytest.raises(
        ConfigError, match=r"data\.method='auto' takes a policy's: name it with --start or --checkpoint"
    ):
        with_auto(values, None)
    assert with_auto(get_config("smoke").to_dict(), None) == get_config("smoke").to_dict()


def test_a_hugging_face_folder_tells_its_model_and_tokenizer_but_no_method(tmp_path):
    save_hf(tmp_path, CONFIG.model, init_params(CONFIG.model, 0), BuiltinTokenizer())
    values = get_config("smoke").to_dict()
    values["model"]["family"] = values["data"]["tokenizer"] = "auto"
    config = from_config_dict(with_auto(values, tmp_path))
    assert (config.model.embed_dim, config.model.num_layers) == (CONFIG.model.embed_dim, CONFIG.model.num_layers)
    assert config.data.tokenizer == str(tmp_path / "tokenizer.json")
    values["data"]["method"] = "auto"
    with pytest.raises(ConfigError, match="does not say which method and task"):
        with_auto(values, tmp_path)


def test_a_stretched_rope_comes_back(tmp_path):
    scaling = {"factor": 8.0, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_max_seq_len": 64}
    config = with_fields(model__rope_scaling=scaling)
    assert load_policy(write_run(tmp_path, config))[0] == config.model


def test_an_exported_policy_is_whole(other, tmp_path):
    policy = apr_jax.load(other[1])
    policy.export(tmp_path / "export")
    again = apr_jax.load(tmp_path / "export")
    assert tokenizer_digest(again.tokenizer) == tokenizer_digest(policy.tokenizer)
    data = dataclasses.replace(again.config.data, tokenizer=policy.config.data.tokenizer)
    assert dataclasses.replace(again.config, data=data, model=policy.config.model) == policy.config
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
    load_given("grpo", tmp_path / "export", again.config)
    with pytest.raises(ConfigError, match=r"data\.method: 'adaptive' there, 'serial' here"):
        load_given("grpo", tmp_path / "export", with_fields(again.config, data__method="serial"))


@pytest.mark.parametrize("given", [True, False])
def test_an_evaluation_takes_the_policys_tokenizer_and_refuses_another(given, run, other):
    path, of_other = other
    model, _, saved = load_policy(of_other)
    file = get_config("smoke")
    file.data.tokenizer = "auto"
    config, tokenizer = configure(of_other, model, saved, file if given else None, {})
    assert tokenizer_digest(tokenizer) == tokenizer_digest(load_tokenizer(path))
    assert same_tokenizer(config.data.tokenizer, path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=builtin is another"):
        configure(of_other, model, saved, file if given else None, {"data.tokenizer": "builtin"})
    file.data.tokenizer = "builtin"
    with pytest.raises(ConfigError, match=r"data\.tokenizer=builtin is another"):
        configure(of_other, model, saved, file, {})
    model, _, saved = load_policy(run)
    with pytest.raises(ConfigError, match=f"the tokenizer builtin, and data.tokenizer={path} is another"):
        configure(run, model, saved, file if given else None, {"data.tokenizer": path})


@pytest.mark.parametrize(
    ("field", "value"), [("data.method", "serial"), ("task.context_windows", (64,)), ("data.condition_on_budget", True)]
)
def test_an_evaluation_does_not_change_what_a_policy_was_trained_for(field, value, run):
    model, _, saved = load_policy(run)
    with pytest.raises(ConfigError, match=f"{field}: .* there, .* here\n.*--method"):
        configure(run, model, saved, None, {field: value})


@pytest.mark.parametrize("asked", ["builtin", "same"])
def test_a_tokenizer_may_be_named_for_a_folder_that_has_none(asked, tmp_path):
    save_hf(tmp_path / "hf", CONFIG.model, init_params(CONFIG.model, 0))
    path = write_tokenizer(tmp_path) if asked == "same" else asked
    for how in ({"fallback": get_config("smoke")}, {"config": get_config("smoke")}):
        with pytest.raises(ConfigError, match=r"hf holds no tokenizer\.json, .*--config\.data\.tokenizer="):
            apr_jax.load(tmp_path / "hf", **how)
        policy = apr_jax.load(tmp_path / "hf", **how, overrides={"data.tokenizer": path})
        assert tokenizer_digest(policy.tokenizer) == tokenizer_digest(BuiltinTokenizer())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["embedding.value", "blocks.0.mlp.down.value", "final_norm.scale.value"])
def test_weights_that_are_not_finite_are_refused_by_name(name, value, tmp_path):
    def spoil(params):
        def one(path, leaf):
            is_it = jax.tree_util.keystr(path, simple=True, separator=".") == name
            return leaf.at[(0,) * leaf.ndim].set(value) if is_it else leaf

        return jax.tree_util.tree_map_with_path(one, params)

    write_run(tmp_path, change=spoil)
    for load in (load_policy, apr_jax.load, lambda path: load_given("sft", path, CONFIG)):
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            load(tmp_path)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float16])
def test_weights_of_another_type_are_refused_by_name(dtype, tmp_path):
    write_run(tmp_path, change=lambda params: jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    with pytest.raises(
        CheckpointError, match=rf"tensor .* is {jnp.dtype(dtype)} .*, and its configuration says float32"
    ):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("vocab_size", 2**31 - 1),
        ("embed_dim", 10**8),
        ("num_layers", 0),
        ("num_layers", "1"),
        ("mlp_dim", 2.0),
        ("num_heads", 3),
        ("family", "gemma"),
        ("unheard_of", 1),
        ("rope_scaling", 3),
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_is_refused_at_once(field, value, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    meta = copy / "checkpoints" / "sft" / "1" / "meta" / "metadata"
    values = json.loads(meta.read_text())
    values["config"]["model"][field] = value
    meta.write_text(json.dumps(values))
    (copy / "checkpoints" / "sft" / "1" / "sums.json").unlink()
    with pytest.raises(CheckpointError, match=f"{copy}.* is damaged: "):
        load_policy(copy)


def test_a_policy_that_is_older_than_a_field_has_the_value_of_before(tmp_path):
    """Adding a field costs nobody a policy: what it does where it is new is what was done before."""
    folder = shutil.copytree(SHIPPED["laptop"], tmp_path / "policy")
    today = find_policy(SHIPPED["laptop"]).config
    older = {section: dict(value) if isinstance(value, dict) else value for section, value in today.items()}
    del older["data"]["children_share"], older["engine"]["page_dtype"]
    for field in ("search_order", "restate", "restate_operation", "attempts", "parent_replay", "cancel_on_success"):
        older["task"].pop(field, None)
    (folder / "apr_jax.json").write_text(json.dumps(older))
    assert from_config_dict(find_policy(folder).config) == from_config_dict(today)
    older["data"]["children_share"] = 0.5  # what a policy says stays
    (folder / "apr_jax.json").write_text(json.dumps(older))
    assert find_policy(folder).config["data"]["children_share"] == 0.5


def test_a_field_of_one_task_is_not_added_to_another():
    saved = find_policy(SHIPPED["multiplication"]).config
    assert not {"search_order", "restate"} & set(saved["task"])
    from_config_dict(saved)
