"""Any Hugging Face tokenizer.json behind the `Tokenizer` protocol."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import tokenizers

from apr_jax.data.tokenizer import save_files
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, JOIN_BEGIN

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[EOS]", "<|endoftext|>")
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_CACHED_LINES = 1 << 16


class HuggingFaceTokenizer:
    """A tokenizer.json, encoded and decoded line by line so that no token spans a newline.

    The start and the end of a spawn and the start of a join are added as special tokens where the vocabulary lacks
    them. BOS, EOS and pad are found by their usual names (pad falls back to EOS).
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file; a tokenizer is "builtin" or the path of a tokenizer.json')
        self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        absent = [
            phrase for phrase in (CALL_END, JOIN_BEGIN, CALL_BEGIN) if self._tokenizer.token_to_id(phrase) is None
        ]
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(phrase, normalized=False, special=True) for phrase in absent]
        )
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._names = {
            "bos_token": _find(_BOS_NAMES, "BOS", vocabulary, path),
            "eos_token": _find(_EOS_NAMES, "EOS", vocabulary, path),
        }
        pads = [name for name in _PAD_NAMES if name in vocabulary]
        self._names["pad_token"] = pads[0] if pads else self._names["eos_token"]
        self.bos_id: int = vocabulary[self._names["bos_token"]]
        self.eos_id: int = vocabulary[self._names["eos_token"]]
        self.pad_id: int = vocabulary[self._names["pad_token"]]
        self.call_begin_id: int = vocabulary[CALL_BEGIN]
        self.call_end_id: int = vocabulary[CALL_END]
        self.join_begin_id: int = vocabulary[JOIN_BEGIN]
        self._control = {self.pad_id, self.bos_id, self.eos_id}
        self._ids_of_line: Callable[[str], tuple[int, ...]] = functools.lru_cache(_CACHED_LINES)(self._encode_line)
        self._ends_line: Callable[[int], bool] = functools.cache(self._is_line_end)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for line in _LINE.findall(text):
            ids += self._ids_of_line(line)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._decode_line(line) for line in self._lines(ids))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        texts = []
        for line in self._lines(ids):
            full, done = self._decode_line(line), 0
            for count in range(1, len(line)):
                prefix = self._decode_line(line[:count])
                whole = len(prefix) >= done and full.startswith(prefix)  # else: a character of several tokens
                texts.append(full[done : len(prefix)] if whole else "")
                done = len(prefix) if whole else done
            texts.append(full[done:])
        return texts

    def save(self, folder: str | pathlib.Path) -> None:
        save_files(json.loads(self._tokenizer.to_str()), folder, self._names)

    def _encode_line(self, line: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(line, add_special_tokens=False).ids)
        if self.decode(ids) != line:
            raise ValueError(f"the tokenizer does not give back the line {line!r}, but {self.decode(ids)!r}")
        return ids

    def _lines(self, ids: Sequence[int]) -> list[list[int]]:
        """Cut the ids after every token that ends in a newline. Raises ValueError for an id out of range."""
        lines: list[list[int]] = []
        new_line = True
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} lies outside the vocabulary of {self.vocab_size}")
            if new_line:
                lines.append([])
            lines[-1].append(int(index))
            new_line = self._ends_line(int(index))
        return lines

    def _decode_line(self, ids: Sequence[int]) -> str:
        kept = [index for index in ids if index not in self._control]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _is_line_end(self, index: int) -> bool:
        return self._decode_line([index]).endswith("\n")


def _find(names: Sequence[str], role: str, vocabulary: Mapping[str, int], path: pathlib.Path) -> str:
    for name in names:
        if name in vocabulary:
            return name
    raise ValueError(f"{path}: no {role} token; it needs one of {', '.join(names)}")
