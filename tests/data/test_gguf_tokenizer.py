"""Tokenizers in the metadata of GGUF files: made, described, and damaged ones."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tokenizers

from apr_jax.config import ConfigError
from apr_jax.data import gguf_tokenizer
from apr_jax.data.gguf_tokenizer import read_gguf_tokenizer, write_gguf_tokenizer
from tests.data.made_tokenizers import llama_like_json

TEXTS = [
    "Hello world, it's 12345 and I'LL go.\n\n  Two  spaces\tand tabs\r\n",
    "x = y_1 + fooBar/baz; HTTPServer <=> don't",
    "\u00dcber \u4f60\u597d \u3072\u3089 caf\u00e9 \U0001f680 -- 'Twas 007",
    " leading and trailing ",
]
STATED = {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}}


def byte_level(kind: str) -> dict[str, Any]:
    """The content of a tokenizer.json whose words are cut as llama.cpp's `kind` says."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind in gguf_tokenizer._WHOLE_WORDS))
    tokenizer.pre_tokenizer = gguf_tokenizer._cuts(kind)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("kind", gguf_tokenizer._WORDS)
def test_llama_cpps_description_gives_the_same_ids_back(kind: str) -> None:
    content = byte_level(kind)
    metadata, reason = write_gguf_tokenizer(content, STATED)
    assert not reason
    written = metadata["tokenizer.ggml.pre"]
    assert gguf_tokenizer._WORDS[written] == gguf_tokenizer._WORDS[kind]
    assert (written in gguf_tokenizer._WHOLE_WORDS) == (kind in gguf_tokenizer._WHOLE_WORDS)
    del metadata["tokenizer.huggingface.json"]
    again, stated = read_gguf_tokenizer(metadata)
    original = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in [*TEXTS, "<s>a<think>b</think></s><|im_end|>\n"]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == ids
        assert again.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    assert again.get_vocab_size() == original.get_vocab_size()
    assert stated["tokenizer_config.json"]["eos_token"] == "</s>"


def test_a_sentencepiece_vocabulary_comes_back_from_its_scores(tmp_path: pathlib.Path) -> None:
    content = json.loads(llama_like_json(tmp_path, TEXTS * 3).read_text())
    metadata, reason = write_gguf_tokenizer(content, STATED)
    assert not reason
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"]
    del metadata["tokenizer.huggingface.json"]
    again, _ = read_gguf_tokenizer(metadata)
    original = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, "\u00fe\u4e16 bytes", "<s>a</s>"]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == ids
        assert again.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(("adds", "wanted"), [(True, [1]), (False, []), (None, [1])])
def test_bos_is_put_where_the_file_says_so(adds: bool | None, wanted: list[int]) -> None:
    metadata, _ = write_gguf_tokenizer(byte_level("llama-bpe"), STATED)
    del metadata["tokenizer.huggingface.json"], metadata["tokenizer.ggml.add_bos_token"]
    if adds is not None:
        metadata["tokenizer.ggml.add_bos_token"] = adds
    tokenizer, stated = read_gguf_tokenizer(metadata)
    plain = tokenizer.encode("Hello", add_special_tokens=False).ids
    assert tokenizer.encode("Hello").ids == [*wanted, *plain]
    assert stated["tokenizer_config.json"]["add_bos_token"] == bool(wanted)


def test_a_turns_end_is_an_end_besides_eos() -> None:
    metadata, _ = write_gguf_tokenizer(
        byte_level("qwen2"), STATED | {"generation_config.json": {"eos_token_id": [3, 2]}}
    )
    assert metadata["tokenizer.ggml.eot_token_id"] == 3
    _, stated = read_gguf_tokenizer(metadata)
    assert stated["generation_config.json"]["eos_token_id"] == [2, 3]


def test_any_other_tokenizer_comes_back_whole_and_llama_cpp_is_told_that_it_has_none(tmp_path: pathlib.Path) -> None:
    from apr_jax.data.tokenizer import BuiltinTokenizer

    BuiltinTokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    metadata, reason = write_gguf_tokenizer(content, {})
    assert reason == "llama.cpp knows no WordLevel tokenizer"
    assert metadata["tokenizer.ggml.model"] == "none"
    again, _ = read_gguf_tokenizer(metadata)
    assert json.loads(again.to_str()) == json.loads(tokenizers.Tokenizer.from_str(json.dumps(content)).to_str())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model=None is not supported"),
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported; those here are gpt2 and llama"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre='unheard-of' is not supported"),
        ({"pre": 3}, "tokenizer.ggml.pre=3 is not supported"),
        ({"tokens": None}, "must list the vocabulary's tokens"),
        ({"tokens": []}, "must list the vocabulary's tokens"),
        ({"tokens": ["a", "a"]}, "each once"),
        ({"tokens": np.arange(3)}, "must list the vocabulary's tokens"),
        ({"token_type": np.asarray([1, 2])}, "token_type has 2 values"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["no_space"]}, "does not load"),
        ({"merges": ["not there"]}, "does not load"),
        ({"bos_token_id": 100_000}, "bos_token_id=100000 is no id of its tokens"),
        ({"eos_token_id": "two"}, "eos_token_id='two' is no id of its tokens"),
        ({"model": "llama"}, "scores must hold a number for each"),
        ({"model": "llama", "scores": np.zeros(3)}, "scores must hold a number for each"),
    ],
)
def test_a_wrong_description_is_one_sentence(values: dict[str, Any], message: str) -> None:
    metadata, _ = write_gguf_tokenizer(byte_level("smollm"), STATED)
    del metadata["tokenizer.huggingface.json"]
    with pytest.raises(ConfigError, match=message) as caught:
        read_gguf_tokenizer(metadata | {f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", ["", "{}", "[]", '{"version": "1.0", "model": {"type": "BPE"}}', "\x00"])
def test_a_damaged_tokenizer_json_inside_is_one_sentence(whole: str) -> None:
    with pytest.raises(ConfigError, match="its tokenizer does not load"):
        read_gguf_tokenizer({"tokenizer.huggingface.json": whole})
