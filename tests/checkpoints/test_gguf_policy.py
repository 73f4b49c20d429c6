"""A GGUF file as the place of a policy."""

import json
import pathlib

import pytest

from apr_jax.checkpoints.identity import agreed_tokenizer, find_policy, own_tokenizer
from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import ConfigError
from apr_jax.config_dict import to_dict
from apr_jax.data.gguf_tokenizer import write_gguf_tokenizer
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.files import FileError
from apr_jax.gguf_file import TRAINED
from apr_jax.model.params import init_params
from apr_jax.model.weights.gguf_writer import save_gguf
from tests.configs import LAPTOP, TINY_MODEL

pytest.importorskip("gguf")


def save(path: pathlib.Path, *, tokenizer: bool = True, trained: str | None = None) -> None:
    BuiltinTokenizer().save(path.parent / "tokenizer")
    content = json.loads((path.parent / "tokenizer" / "tokenizer.json").read_text())
    stated = {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}}
    metadata = write_gguf_tokenizer(content, stated)[0] if tokenizer else {}
    metadata |= {} if trained is None else {TRAINED: trained}
    save_gguf(path, TINY_MODEL, init_params(TINY_MODEL, 0), metadata, name="tiny")


def test_a_file_or_its_folder_is_a_policy(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tiny.gguf"
    save(path)
    for place in (path, tmp_path):
        assert find_policy(place).path == path
        assert find_policy(place).config is None
        assert load_policy(place)[0].num_layers == TINY_MODEL.num_layers
        assert own_tokenizer(place, None) == str(path)


def test_our_own_file_brings_the_configuration_of_its_training(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tiny.gguf"
    save(path, trained=json.dumps(to_dict(LAPTOP)))
    model, _, saved = load_policy(path)
    assert saved == to_dict(LAPTOP)
    assert model.attention == LAPTOP.model.attention
    assert own_tokenizer(path, saved) == "builtin"


@pytest.mark.parametrize("trained", ["{", "[]", '{"model": {}}'])
def test_a_damaged_configuration_is_one_sentence(trained: str, tmp_path: pathlib.Path) -> None:
    save(tmp_path / "tiny.gguf", trained=trained)
    with pytest.raises(FileError, match=r"tiny\.gguf"):
        load_policy(tmp_path / "tiny.gguf")


def test_a_file_without_a_tokenizer_takes_none_by_guessing(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "tiny.gguf", tokenizer=False)
    own = own_tokenizer(tmp_path / "tiny.gguf", None)
    assert own is None
    with pytest.raises(ConfigError, match="no other tokenizer is guessed"):
        agreed_tokenizer(tmp_path / "tiny.gguf", own, None)


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tiny\.gguf"):
        load_policy(tmp_path / "tiny.gguf")
