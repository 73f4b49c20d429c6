"""Hugging Face tokenizers of two kinds, trained on the spot."""

import json
import pathlib
from collections.abc import Sequence

import tokenizers


def byte_level_json(folder: pathlib.Path, texts: list[str], specials: list[str]) -> pathlib.Path:
    """A byte-level BPE trained here, as a tokenizer.json. Its merges would cross newlines if they were let."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def llama_like_json(folder: pathlib.Path, texts: list[str]) -> pathlib.Path:
    """As Llama-2's: a blank is put before the text and taken off in decoding, and a newline is a byte token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    as_json = json.loads(tokenizer.to_str())
    as_json["added_tokens"] = [token for token in as_json["added_tokens"] if token["content"] in specials]
    as_json["model"]["byte_fallback"] = True
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(as_json))
    return path


def word_level_json(folder: pathlib.Path, specials: Sequence[str]) -> pathlib.Path:
    """A small vocabulary that begins with these special tokens."""
    words = [*specials, "<unk>", "1", "2", "+", "=", "\n"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def characters_json(folder: pathlib.Path, characters: str) -> pathlib.Path:
    """A vocabulary of these characters alone."""
    specials = ["<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted({*characters})])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
