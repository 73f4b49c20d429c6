"""A policy whose tokenizer lacks the marks: its embedding grows by their rows, or the marks stay text."""

import dataclasses

import numpy as np
import pytest

from apr_jax.checkpoints.identity import with_auto
from apr_jax.checkpoints.trees import flatten
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.tokenizer import config_tokenizer, load_tokenizer
from apr_jax.evaluation.policy import check_spelling, check_vocabulary, configure
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.tasks import task_of
from apr_jax.train.origins import load_given
from apr_jax.train.run import train
from configs.grpo import get_config
from tests.data.made_tokenizers import byte_level_json, characters_json
from tests.train.small import small_config


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = load_tokenizer(str(byte_level_json(folder, ["1+2=3\n"], ["<s>", "</s>"])))
    model = dataclasses.replace(small_config().model, vocab_size=tokenizer.vocab_size, tie_embeddings=request.param)
    save_hf(folder, model, init_params(model, 0), tokenizer)
    return folder


def from_policy(folder, **fields) -> Config:
    """The configuration of a run that takes model and tokenizer of a policy."""
    auto = {"model.family": "auto", "data.tokenizer": "auto"}
    values = to_dict(small_config())
    for path, value in (auto | fields).items():
        section, name = path.split(".")
        values[section][name] = value
    return from_config_dict(with_auto(values, folder))


def test_new_rows_are_the_mean_of_those_that_are_there(folder):
    config = from_policy(folder, **{"data.add_marker_tokens": True})
    own, grown = load_tokenizer(str(folder / "tokenizer.json")), config_tokenizer(config)
    assert grown.vocab_size == config.model.vocab_size == own.vocab_size + len(task_of(config).marks)
    before = flatten(init_params(dataclasses.replace(config.model, vocab_size=own.vocab_size), 0))
    after = flatten(load_given("sft", folder, config).params)
    for name, array in before.items():
        if array.shape == after[name].shape:
            np.testing.assert_array_equal(array, after[name])
            continue
        axis = int(np.argmax(np.array(array.shape) != np.array(after[name].shape)))
        old, new = np.split(np.asarray(after[name]), [own.vocab_size], axis=axis)
        np.testing.assert_array_equal(array, old)
        np.testing.assert_allclose(new, np.broadcast_to(np.mean(array, axis=axis, keepdims=True), new.shape), atol=1e-7)


def test_rows_that_a_padded_vocabulary_has_for_them_are_new_as_well(folder, tmp_path):
    """Many models have more rows than their tokenizer has ids."""
    own = load_tokenizer(str(folder / "tokenizer.json"))
    model = dataclasses.replace(small_config().model, vocab_size=own.vocab_size + 64, tie_embeddings=True)
    padded = init_params(model, 1)
    save_hf(tmp_path, model, padded, own)
    config = from_policy(tmp_path, **{"data.add_marker_tokens": True, "mesh.tensor": 1})
    assert config.model.vocab_size == model.vocab_size
    rows = flatten(load_given("sft", tmp_path, config).params)
    (name,) = (name for name in rows if "embedding" in name)
    before, after = np.asarray(flatten(padded)[name]), np.asarray(rows[name])
    np.testing.assert_array_equal(before[: own.vocab_size], after[: own.vocab_size])
    np.testing.assert_allclose(after[own.vocab_size :], before[: own.vocab_size].mean(0)[None].repeat(64, 0), atol=1e-7)
    kept = load_given("sft", tmp_path, from_policy(tmp_path))
    np.testing.assert_array_equal(before, np.asarray(flatten(kept.params)[name]))


def test_a_grown_vocabulary_can_be_split(folder):
    own = load_tokenizer(str(folder / "tokenizer.json"))
    for parts in (1, 2, 4):
        auto = {"model.family": "auto", "data.tokenizer": "auto"}
        values = to_dict(small_config())
        for path, value in {**auto, "data.add_marker_tokens": True, "mesh.tensor": parts}.items():
            section, name = path.split(".")
            values[section][name] = value
        size = with_auto(values, folder)["model"]["vocab_size"]
        assert size % parts == 0
        assert 0 <= size - own.vocab_size - len(task_of(small_config()).marks) < parts


def test_marks_that_are_no_tokens_and_cannot_be_spelt_are_refused_with_what_to_do(tmp_path):
    """Prompts alone can be written: this vocabulary has their characters and no more."""
    task = task_of(small_config())
    prompt = task.dialects["adaptive"].opening(task.read_words(task.example.split()))
    path = characters_json(tmp_path, prompt + "0123456789")
    tokenizer = load_tokenizer(str(path))
    model = dataclasses.replace(small_config().model, vocab_size=tokenizer.vocab_size)
    save_hf(tmp_path, model, init_params(model, 0), tokenizer)
    bare = from_policy(tmp_path)
    message = r"no token for the mark '<End Calling.*cannot spell it.*data\.add_marker_tokens=True.*another tokenizer"
    with pytest.raises(ConfigError, match=message):
        train(bare, tmp_path / "run", start=tmp_path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=message):
        configure(tmp_path, model, None, get_config("smoke"), {})
    check_spelling(config := from_policy(tmp_path, **{"data.add_marker_tokens": True}), config_tokenizer(config))


def test_without_them_the_vocabulary_stays_and_a_larger_one_is_another_model(folder):
    config = from_policy(folder)
    check_vocabulary(config.model, config_tokenizer(config))
    assert load_given("sft", folder, config).params is not None
    larger = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=600))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: \d+ there, 600 here"):
        load_given("sft", folder, larger)
