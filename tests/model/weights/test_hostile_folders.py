"""A damaged or hostile Hugging Face folder is refused in one sentence with its path, without traceback or wait.

A good one loads, whatever links a cache makes of its files.
"""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

import apr_jax
from apr_jax.config import ConfigError
from apr_jax.files import FileError
from apr_jax.model.weights.hf import load_hf
from apr_jax.reasoning.settings import banned_tokens
from configs.grpo import get_config
from tests.model.weights.hostile import CASES, vocabulary, write_good

_SECONDS = 20


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("hostile") / "good")


@pytest.fixture(autouse=True)
def alarm():
    """End a test that waits, for a pipe or at a loop."""

    def ring(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(folder):
    return apr_jax.load(folder, fallback=get_config("smoke"))


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused_in_one_sentence(case, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "policy")
    CASES[case](folder)
    with pytest.raises((ConfigError, FileError, FileNotFoundError)) as refusal:
        load(folder)
    message = str(refusal.value)
    assert str(folder) in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_the_good_folder_loads(good):
    assert load(good).tokenizer.eos_ids == (2,)


def test_links_of_hugging_faces_cache_are_followed(good, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(good, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    one, other = load_hf(snapshot)[1], load_hf(good)[1]
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert load(snapshot).tokenizer.vocab_size == load(good).tokenizer.vocab_size


def test_a_byte_order_mark_is_read_over(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "policy")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    load(folder)


def test_ids_that_no_token_has_are_never_drawn(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "policy")
    vocabulary(lambda whole: whole["model"]["vocab"].pop("200"))(folder)
    hole = json.loads((good / "tokenizer.json").read_text())["model"]["vocab"]["200"]
    policy = load(folder)
    assert policy.tokenizer.unused_ids == (hole,)
    assert hole in banned_tokens(policy.tokenizer, policy.config.model.vocab_size)


def test_no_pickle_is_ever_read(good, tmp_path, monkeypatch):
    folder = shutil.copytree(good, tmp_path / "policy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr("pickle.load", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(FileError, match=r"pytorch_model\.bin: PyTorch's pickles can run code.*save_pretrained"):
        load(folder)


def test_nothing_outside_the_folder_is_opened(good, tmp_path, monkeypatch):
    """Neither by names in an index nor by links."""
    opened = []
    real = pathlib.Path.open

    def spy(self, *args, **kwargs):
        opened.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", spy)
    for name in (
        "index names '/etc/passwd'",
        "index names '../outside'",
        "shard linked away",
        "config.json linked away",
    ):
        folder = shutil.copytree(good, tmp_path / name.replace("/", "_"))
        CASES[name](folder)
        with pytest.raises(FileError):
            load(folder)
    assert opened
    assert all(path.resolve().is_relative_to(tmp_path) and "outside" not in path.name for path in opened)
