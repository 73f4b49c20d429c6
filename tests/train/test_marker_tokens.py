"""A policy whose tokenizer lacks the marks: its embedding grows by their rows, or the marks stay text."""

import dataclasses

import numpy as np
import pytest

from apr_jax.checkpoints.identity import with_auto
from apr_jax.checkpoints.trees import flatten
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.tokenizer import config_tokenizer, load_tokenizer
from apr_jax.evaluation.policy import check_vocabulary
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.tasks import task_of
from apr_jax.train.origins import load_given
from tests.data.made_tokenizers import byte_level_json
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


def test_without_them_the_vocabulary_stays_and_a_larger_one_is_another_model(folder):
    config = from_policy(folder)
    check_vocabulary(config.model, config_tokenizer(config))
    assert load_given("sft", folder, config).params is not None
    larger = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=600))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: \d+ there, 600 here"):
        load_given("sft", folder, larger)
