"""BOS and EOS are those that a Hugging Face folder states. The facts of `CASES` are transformers 5.24's."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.data.tokenizer import BuiltinTokenizer, load_tokenizer, tokenizer_digest
from apr_jax.reasoning.settings import banned_tokens
from tests.data.made_tokenizers import word_level_json

NAMES = ("<|bos|>", "<|end|>", "<|eot|>", "<s>", "</s>", "<|pad|>")  # ids 0 to 5
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CONFIG, GENERATION, TOKENIZER, OLD = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SMOLLM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
# Per case: the vocabulary's special tokens, the files, transformers' ids of the tokenizer's own BOS and EOS, and the
# ids at which its `generate` stops.
CASES: dict[str, tuple[Any, ...]] = {
    "ids in config.json": (NAMES, {CONFIG: {"bos_token_id": 0, "eos_token_id": 2}}, (None, None), [2]),
    "several ids in config.json": (NAMES, {CONFIG: {"bos_token_id": 0, "eos_token_id": [1, 2]}}, (None, None), [1, 2]),
    "generation_config.json goes first": (
        NAMES,
        {CONFIG: {"bos_token_id": 0, "eos_token_id": 4}, GENERATION: {"bos_token_id": 3, "eos_token_id": [1, 2]}},
        (None, None),
        [1, 2],
    ),
    "the tokenizer's own and several stops": (
        NAMES,
        {GENERATION: {"eos_token_id": [1, 2]}, TOKENIZER: {**FAST, "bos_token": "<|bos|>", "eos_token": "<|eot|>"}},
        (0, 2),
        [1, 2],
    ),
    "the tokenizer's own as objects": (
        NAMES,
        {
            CONFIG: {"eos_token_id": 1},
            TOKENIZER: {**FAST, "bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "<|end|>"},
        },
        (3, 1),
        [1],
    ),
    "the old map goes before tokenizer_config.json": (
        NAMES,
        {
            CONFIG: {"eos_token_id": 2},
            TOKENIZER: {**FAST, "eos_token": "</s>"},
            OLD: {"bos_token": "<|bos|>", "eos_token": {"content": "<|eot|>"}},
        },
        (0, 2),
        [2],
    ),
    "unless the latter lists its added tokens": (
        NAMES,
        {
            CONFIG: {"bos_token_id": 0, "eos_token_id": 4},
            TOKENIZER: {**FAST, "eos_token": "</s>", "added_tokens_decoder": {"2": {"content": "<|eot|>"}}},
            OLD: {"bos_token": "<s>", "eos_token": "<|eot|>"},
        },
        (None, 4),
        [4],
    ),
    "a tokenizer without BOS, as Qwen's": (
        NAMES,
        {
            CONFIG: {"bos_token_id": 0, "eos_token_id": 2},
            TOKENIZER: {**FAST, "bos_token": None, "eos_token": "<|eot|>"},
        },
        (None, 2),
        [2],
    ),
    "SmolLM": (
        SMOLLM,
        {
            CONFIG: {"bos_token_id": 0, "eos_token_id": 0},
            TOKENIZER: {**FAST, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        },
        (0, 0),
        [0],
    ),
    "SmolLM Instruct": (
        SMOLLM,
        {
            CONFIG: {"bos_token_id": 1, "eos_token_id": 2},
            TOKENIZER: {**FAST, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        },
        (1, 2),
        [2],
    ),
    "Llama 3 Instruct": (
        LLAMA3,
        {
            CONFIG: {"bos_token_id": 0, "eos_token_id": 1},
            GENERATION: {"bos_token_id": 0, "eos_token_id": [1, 3, 2]},
            TOKENIZER: {**FAST, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        },
        (0, 2),
        [1, 3, 2],
    ),
    "R1-Distill-Llama": (
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot_id|>", "</s>"),
        {
            CONFIG: {"bos_token_id": 0, "eos_token_id": 1},
            TOKENIZER: {
                **FAST,
                "bos_token": {"content": "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "__type": "AddedToken"},
                "eos_token": {"content": "<\uff5cend\u2581of\u2581sentence\uff5c>", "__type": "AddedToken"},
            },
        },
        (0, 1),
        [1],
    ),
}


def write(folder: pathlib.Path, specials: tuple[str, ...], files: dict[str, dict]) -> pathlib.Path:
    path = word_level_json(folder, specials)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("case", CASES)
def test_bos_and_eos_are_those_that_the_folder_states(case, tmp_path):
    specials, files, (own_bos, own_eos), stops = CASES[case]
    tokenizer = load_tokenizer(str(write(tmp_path, specials, files)))
    assert tokenizer.eos_id == (stops[0] if own_eos is None else own_eos)
    assert set(tokenizer.eos_ids) == {*stops, tokenizer.eos_id}
    if own_bos is not None:
        assert tokenizer.bos_id == own_bos
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.eos_ids]) == ""
    assert not {*banned_tokens(tokenizer, tokenizer.vocab_size)} & {*tokenizer.eos_ids}


@pytest.mark.parametrize("case", CASES)
def test_they_come_back_from_a_folder_that_we_wrote(case, tmp_path):
    specials, files, *_ = CASES[case]
    one = load_tokenizer(str(write(tmp_path, specials, files)))
    one.save(tmp_path / "again")
    other = load_tokenizer(str(tmp_path / "again" / "tokenizer.json"))
    for name in ("bos_id", "eos_id", "eos_ids", "pad_id", "vocab_size"):
        assert getattr(one, name) == getattr(other, name), name
    assert tokenizer_digest(one) == tokenizer_digest(other)


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    specials, files, own, stops = CASES[case]
    write(tmp_path, specials, {**files, CONFIG: {"model_type": "llama", **files.get(CONFIG, {})}})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == own
    if GENERATION in files:
        generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    else:
        generation = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert np.atleast_1d(generation.eos_token_id).tolist() == stops


@pytest.mark.parametrize(
    ("specials", "ids"),
    [(("<s>", "</s>"), (0, 1)), (("[BOS]", "[EOS]", "[PAD]"), (0, 1)), (("<|endoftext|>",), (0, 0))],
)
def test_a_bare_file_goes_by_its_only_usual_names(specials, ids, tmp_path):
    tokenizer = load_tokenizer(str(write(tmp_path, specials, {})))
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids


@pytest.mark.parametrize(
    "files",
    [{GENERATION: {"pad_token_id": -1}}, {TOKENIZER: {"pad_token": "[PAD]"}}, {CONFIG: {"pad_token_id": 99}}, {}],
)
def test_padding_that_is_no_token_is_any_other(files, tmp_path):
    assert load_tokenizer(str(write(tmp_path, ("<s>", "</s>"), files))).pad_id == 1
    assert load_tokenizer(str(write(tmp_path, ("<s>", "</s>", "<pad>"), files))).pad_id == 2


@pytest.mark.parametrize("specials", [("<s>", "</s>", "<|im_end|>"), SMOLLM, LLAMA3, ("<s>",), ()])
def test_nothing_is_guessed_among_several(specials, tmp_path):
    with pytest.raises(ConfigError, match=r"no (BOS|EOS) token is stated.*tokenizer_config\.json"):
        load_tokenizer(str(write(tmp_path, specials, {})))


def test_more_stops_than_can_be_matched_are_refused(tmp_path):
    names = tuple(f"<{index}>" for index in range(9))
    files = {CONFIG: {"bos_token_id": 0, "eos_token_id": list(range(1, 9))}}
    with pytest.raises(ConfigError, match="8 EOS ids, and at most 6"):
        load_tokenizer(str(write(tmp_path, names, files)))


def test_digests_are_of_content(tmp_path):
    builtin = BuiltinTokenizer()
    builtin.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    assert tokenizer_digest(load_tokenizer(str(path))) == tokenizer_digest(builtin)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values, sort_keys=True))
    assert tokenizer_digest(load_tokenizer(str(path))) == tokenizer_digest(builtin)
    vocab = values["model"]["vocab"]
    vocab["7"], vocab["8"] = vocab["8"], vocab["7"]
    path.write_text(json.dumps(values))
    assert tokenizer_digest(load_tokenizer(str(path))) != tokenizer_digest(builtin)
