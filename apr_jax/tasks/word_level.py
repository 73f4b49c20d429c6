"""A vocabulary of whole texts, in the format of Hugging Face's `tokenizers`."""

from collections.abc import Sequence
from typing import Any


def word_level(
    words: Sequence[str],
    num_special: int,
    split: str,
    *,
    normalizers: Sequence[dict[str, Any]] = (),
    decoders: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return tokenizer.json for words that become their places in the list. What is no word becomes "<unk>".

    Args:
      words: all of them; the first `num_special` are special tokens, which no text has.
      split: a regex of the pieces that a text is cut into.
      normalizers: what a text goes through before, one after the other.
      decoders: what pieces go through before they are joined.
    """
    fuse = {"type": "Fuse"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for index, name in enumerate(words[:num_special])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers]} if normalizers else None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, fuse]} if decoders else fuse,
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
