"""Token ids are made once for a data set and a tokenizer, and what is damaged or stale is made again."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from apr_jax.config_dict import from_config_dict
from apr_jax.data import pipeline, token_store
from apr_jax.data.demonstrations import load_split
from apr_jax.data.pipeline import tokenize
from apr_jax.data.token_store import SplitTokenizer, TokenStore
from apr_jax.data.tokenized import LossWeights
from apr_jax.data.tokenizer import config_tokenizer
from apr_jax.train.sft import sft_options
from tests.train.small import small_config_dict

WEIGHTS = LossWeights(4.0, False, (5,))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Data sets of two methods."""
    folder = tmp_path_factory.mktemp("data")
    configs = {}
    for method in ("adaptive", "hogwild"):
        values = small_config_dict(str(folder))
        values.data.method, values.grpo.num_steps = method, 0
        values.sft.row_len = values.grpo.row_len = values.model.max_seq_len = 128 if method == "adaptive" else 600
        configs[method] = from_config_dict(values)
        load_split(configs[method], "train")
    return folder, configs


@pytest.fixture
def config(built, tmp_path):
    """A configuration with data of its own."""
    shutil.copytree(built[0], tmp_path / "data", ignore=shutil.ignore_patterns("tokens"))
    found = built[1]["adaptive"]
    return dataclasses.replace(found, data=dataclasses.replace(found.data, directory=str(tmp_path / "data")))


def _store(config):
    return TokenStore(config, "train", sft_options(config), load_split(config, "train").digest())


def _tokenized(config):
    return tokenize(load_split(config, "train"), config_tokenizer(config), sft_options(config))


def _assert_same(ours, theirs):
    assert (len(ours), ours.num_dropped) == (len(theirs), theirs.num_dropped)
    for index in range(len(ours)):
        mine, other = ours.sequence(index, WEIGHTS), theirs.sequence(index, WEIGHTS)
        assert all(np.array_equal(mine[name], other[name]) for name in {*mine, *other})


def _forget(monkeypatch):
    """Whoever tokenises more than a probe fails."""
    monkeypatch.setattr(token_store.TokenStore, "_parts", lambda *_: pytest.fail("tokenised again"))


@pytest.mark.parametrize("method", ["adaptive", "hogwild"])
def test_what_is_stored_is_what_tokenising_gives(built, method, monkeypatch):
    config, counted = built[1][method], []
    monkeypatch.setattr(token_store, "_CHUNK", 5)
    store = _store(config)
    assert store.read() is None
    calls = store.make(counted.append)
    assert sum(counted) == config.data.num_train
    assert len(counted) == 5
    expected = _tokenized(config)
    _assert_same(calls, expected)
    _forget(monkeypatch)
    _assert_same(store.read(), expected)
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name]


def test_several_workers_make_the_same(config, monkeypatch):
    monkeypatch.setattr(token_store, "_WORTH_A_WORKER", 1)
    monkeypatch.setattr(token_store, "_CHUNK", 7)
    two = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    _assert_same(_store(two).make(), _tokenized(config))


def test_another_row_spelling_or_data_set_has_a_store_of_its_own(config):
    rows = dataclasses.replace(config, sft=dataclasses.replace(config.sft, row_len=192))
    spelt = dataclasses.replace(config, data=dataclasses.replace(config.data, bos="none"))
    paths = {_store(each).path for each in (config, rows, spelt)}
    paths.add(TokenStore(config, "train", sft_options(config), "another").path)
    assert len(paths) == 4


DAMAGE = {
    "a bit": (
        lambda path: _change(path / "tokens.bin", lambda data: data[:9] + b"\xff" + data[10:]),
        "checksum",
    ),
    "cut short": (lambda path: _change(path / "tokens.bin", lambda data: data[:-7]), "bytes"),
    "empty": (lambda path: _change(path / "parts.bin", lambda data: b""), "bytes"),
    "an array gone": (lambda path: (path / "sizes.bin").unlink(), "sizes.bin: is missing"),
    "its description gone": (lambda path: (path / "about.json").unlink(), "about.json: is missing"),
    "another description": (lambda path: (path / "about.json").write_text('{"arrays": {"tokens": 3}}'), "unexpected"),
    "a torn description": (lambda path: _change(path / "about.json", lambda data: data[:30]), "not JSON"),
}


def _change(path, how):
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_named_and_made_again(config, capsys, name):
    damage, said = DAMAGE[name]
    store, expected = _store(config), _tokenized(config)
    store.make()  # mapped, and so not kept: what follows changes the file
    damage(store.path)
    assert store.read() is None
    assert said in (text := capsys.readouterr().err)
    assert str(store.path) in text
    assert "it is made again" in text
    _assert_same(store.make(), expected)
    _assert_same(store.read(), expected)


def test_a_store_of_another_version_is_made_again(config, capsys, monkeypatch):
    store = _store(config)
    store.make()
    original = pipeline.tokenize_arrays

    def other(*args):
        arrays = original(*args)
        return {**arrays, "tokens": arrays["tokens"] + arrays["tokens"].dtype.type(1)}

    monkeypatch.setattr(token_store, "tokenize_arrays", other)
    assert store.read() is None
    assert "its tokens are of another version of this program; it is made again" in capsys.readouterr().err


def test_a_leftover_of_a_killed_process_is_replaced(config):
    store = _store(config)
    (left := store.path.with_suffix(".new")).mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")
    expected = store.make()
    assert not left.exists()
    _assert_same(store.read(), expected)


def test_where_nothing_can_be_written_ids_are_held_in_memory(config, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28), "tokens.bin")

    store, expected = _store(config), _tokenized(config)
    monkeypatch.setattr(os, "fsync", full)
    _assert_same(store.make(), expected)
    assert "No space left on device" in (said := capsys.readouterr().err)
    assert "token ids are held in memory" in said
    assert store.read() is None
    assert not store.path.exists()


def test_ids_are_mapped_and_not_read(config):
    calls = _store(config).make()
    assert isinstance(calls.tokens.base, np.memmap) or isinstance(calls.tokens, np.memmap)
    assert not calls.tokens.flags.writeable
    about = json.loads((_store(config).path / "about.json").read_text())
    assert about["made_from"]["row_len"] == config.sft.row_len
    assert repr(SplitTokenizer(config, "train", sft_options(config)))
