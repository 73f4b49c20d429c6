"""Any Hugging Face tokenizer.json behind the `Tokenizer` protocol."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import tokenizers

from apr_jax.data.special_tokens import read_special_tokens
from apr_jax.data.tokenizer import save_files
from apr_jax.files import FileError, file_in
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, JOIN_BEGIN

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_CACHED_LINES = 1 << 16


class HuggingFaceTokenizer:
    """A tokenizer.json, encoded and decoded line by line so that no token spans a newline.

    The start and the end of a spawn and the start of a join are added as special tokens where the vocabulary lacks
    them. BOS, EOS and pad are those that the files beside it state (`special_tokens`).
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Load the file at `path`.

        Raises:
            FileNotFoundError: there is none.
            FileError: it is damaged.
            ConfigError: as `read_special_tokens`.
        """
        path = pathlib.Path(path)
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file; a tokenizer is "builtin" or the path of a tokenizer.json')
        self._tokenizer = _load(path)
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
        special = read_special_tokens(path, vocabulary)
        self.bos_id, self.eos_ids, self.pad_id = special
        self.eos_id = self.eos_ids[0]
        self.call_begin_id: int = vocabulary[CALL_BEGIN]
        self.call_end_id: int = vocabulary[CALL_END]
        self.join_begin_id: int = vocabulary[JOIN_BEGIN]
        self._control = {self.pad_id, self.bos_id, *self.eos_ids}
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
        save_files(json.loads(self._tokenizer.to_str()), folder, self, self._tokenizer.id_to_token)

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


def _load(path: pathlib.Path) -> tokenizers.Tokenizer:
    path = file_in(path.parent, path.name)
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except OSError:
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path}: no tokenizer that the library reads ({reason}); fetch the file again") from error
