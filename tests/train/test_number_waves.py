"""Waves as a start: which tokens get them, that sums and products show in them, and that nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.data.tokenizer import BuiltinTokenizer, load_tokenizer
from apr_jax.model.params import init_params
from apr_jax.tasks.multiplication.vocabulary import TOKENIZER as TOKENIZER_OF_PRODUCTS
from apr_jax.train.number_waves import PERIODS, number_tokens, number_waves, with_number_waves
from tests.train.small import small_config

TOKENIZER = BuiltinTokenizer()
MODEL = dataclasses.replace(small_config().model, embed_dim=64)


def test_numbers_that_are_one_token_have_waves_and_digits_have_none():
    tokens = number_tokens(TOKENIZER)
    assert [*tokens] == [*range(256)]
    assert TOKENIZER.token_texts([*tokens.values()]) == [*map(str, range(256))]
    digit = TOKENIZER.encode("256")[0]
    before, after = init_params(MODEL, 0), with_number_waves(init_params(MODEL, 0), TOKENIZER, 0.1)
    rows = np.asarray([*tokens.values()])
    width = number_waves(np.arange(2)).shape[1]
    np.testing.assert_allclose(after["embedding"][...][rows, :width], 0.1 * number_waves(np.arange(256)), atol=1e-7)
    np.testing.assert_array_equal(after["embedding"][...][rows, width:], before["embedding"][...][rows, width:])
    np.testing.assert_array_equal(after["embedding"][...][digit], before["embedding"][...][digit])
    rest = [jax.tree.leaves({**params, "embedding": 0}) for params in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_a_head_of_its_own_has_the_same_waves():
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    params = with_number_waves(init_params(untied, 0), TOKENIZER, 0.1)
    rows = np.asarray([*number_tokens(TOKENIZER).values()])
    width = number_waves(np.arange(2)).shape[1]
    np.testing.assert_array_equal(params["head"][...].T[rows, -width:], params["embedding"][...][rows, :width])


def test_digits_that_name_their_place_have_waves_of_both():
    tokenizer = load_tokenizer(str(TOKENIZER_OF_PRODUCTS))
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, embed_dim=160, tie_embeddings=False)
    params = with_number_waves(init_params(model, 0), tokenizer, 0.5)
    embedding, head = params["embedding"][...], params["head"][...].T
    waves = 0.5 * number_waves(np.arange(24))
    width, rows = waves.shape[1], {text: tokenizer.encode(text)[0] for text in ("b7", "b^3", "c*1", "7")}
    for text, place, number in (("b7", 1, 7), ("b^3", 1, 3), ("c*1", 2, 1)):
        both = np.concatenate([waves[number], waves[place]])
        np.testing.assert_allclose(embedding[rows[text], : 2 * width], both, atol=1e-6)
        np.testing.assert_allclose(head[rows[text], -width:], waves[number], atol=1e-6)
        np.testing.assert_allclose(head[rows[text], -2 * width : -width], waves[place], atol=1e-6)
    np.testing.assert_allclose(embedding[rows["7"], :width], waves[7], atol=1e-6)


def test_numbers_are_told_apart_and_sums_turn_by_both_terms():
    waves = number_waves(np.arange(256))
    alike = waves @ waves.T
    assert (np.diagonal(alike)[:, None] - alike)[~np.eye(256, dtype=bool)].min() > 2
    half = waves.shape[1] // 2
    turns = (waves[:, :half] + 1j * waves[:, half:])[:, : len(PERIODS)]
    np.testing.assert_allclose(turns[30] * turns[12], turns[42], atol=1e-5)


def test_a_narrow_embedding_is_refused():
    narrow = dataclasses.replace(MODEL, embed_dim=32)
    with pytest.raises(ConfigError, match=r"model.embed_dim=32 holds no 40 waves"):
        with_number_waves(init_params(narrow, 0), TOKENIZER, 0.1)
