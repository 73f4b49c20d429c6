"""Any Hugging Face tokenizer.json, or the tokenizer of a GGUF file, behind the `Tokenizer` protocol."""

import codecs
import contextlib
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import tokenizers

from apr_jax.config import ConfigError
from apr_jax.data.chat import ChatTemplate
from apr_jax.data.special_tokens import Stated, read_special_tokens, stated_beside
from apr_jax.data.tokenizer import AS_IS, Spelling, save_files
from apr_jax.files import FileError, file_in
from apr_jax.gguf_file import open_gguf
from apr_jax.paths import is_there, path_of

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_CACHED_LINES = 1 << 16
_MOST_IDS = 1 << 22
# Text that goes on is cut as after one of these. They are tried in turn, until one is not merged with the text.
_ANCHORS = ("\n", "a", "1", ".", ";", "Q", "~", " ")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character stands for in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


class HuggingFaceTokenizer:
    """A tokenizer.json. BOS, EOS and pad are those that the files beside it state (`special_tokens`)."""

    def __init__(self, path: str | pathlib.Path, spelling: Spelling = AS_IS) -> None:
        """Load the file at `path`.

        Raises:
            FileNotFoundError: there is none.
            FileError: it is damaged.
            ConfigError: as `read_special_tokens`, or for a wrong chat template that is to be used.
        """
        path = path_of(path)
        if not is_there(path):
            raise FileNotFoundError(f'{path}: no such file; a tokenizer is "builtin" or the path of a tokenizer.json')
        self._tokenizer, stated = _load_gguf(path) if path.suffix == ".gguf" else (_load(path), stated_beside(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        absent = [mark for mark in spelling.markers if self._tokenizer.token_to_id(mark) is None]
        added = [tokenizers.AddedToken(mark, normalized=False, special=True) for mark in absent]
        self._tokenizer.add_special_tokens(added)
        self._added = {*self._tokenizer.get_added_tokens_decoder()}
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > _MOST_IDS:
            raise FileError(f"{path}: an id of {self.vocab_size - 1:,} is above {_MOST_IDS:,}; fetch the file again")
        self.unused_ids = tuple(sorted(set(range(self.vocab_size)) - set(vocabulary.values())))
        special = read_special_tokens(path, vocabulary, stated)
        self.bos_id, self.eos_ids, self.pad_id = special
        self.eos_id = self.eos_ids[0]
        self._control = {self.pad_id, self.bos_id, *self.eos_ids}
        self._ids_of_line: Callable[[str], tuple[int, ...]] = functools.lru_cache(_CACHED_LINES)(self._encode_checked)
        self._continue: Callable[[str], list[int]] = functools.lru_cache(_CACHED_LINES)(self._encode_after_text)
        self._piece: Callable[[int, bool], bytes] = functools.cache(self._spell)
        decoder = json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        self._decoders = {*re.findall(r'"type": "(\w+)"', decoder)}
        self._by_line = spelling.encoding == "lines"
        self.num_bos = self._count_bos(stated)
        self._template = stated.get("tokenizer_config.json", {}).get("chat_template")
        self._chat = ChatTemplate.of(stated) if spelling.chat else None
        self.chats = self._chat is not None
        own_bos = 0 if self._chat else self.num_bos  # a template writes its own
        self._begin = [self.bos_id] * (own_bos if spelling.num_bos is None else spelling.num_bos)
        self.join_ids = tuple(index for join in spelling.joins if (index := self.mark_id(join)) is not None)

    def encode(self, text: str) -> list[int]:
        if not self._by_line:
            return list(self._encode_checked(text))
        ids: list[int] = []
        for line in _LINE.findall(text):
            ids += self._ids_of_line(line)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, in the chat template if the tokenizer is to use one.

        Raises ValueError where it would not come back, or spells a special token of the template; ConfigError where the
        template does not take it.
        """
        if self._chat is None:
            return [*self._begin, *self.encode(text)]
        for token in self._tokenizer.get_added_tokens_decoder().values():
            if token.content in text:
                raise ValueError(f"the prompt {text!r} spells the special token {token.content!r}")
        rendered = self._chat.render([{"role": "user", "content": text}])
        if text.strip() not in rendered:
            raise ConfigError("the chat template leaves a prompt out, or changes it: set data.chat_template='none'")
        return [*self._begin, *self._tokenizer.encode(rendered, add_special_tokens=False).ids]

    def encode_continuation(self, text: str, before: Sequence[int]) -> list[int]:
        if self._begins(before):
            return self.encode(text)
        line, newline, rest = text.partition("\n") if self._by_line else (text, "", "")
        return [*self._continue(line + newline), *self.encode(rest)]

    def mark_id(self, mark: str) -> int | None:
        index: int | None = self._tokenizer.token_to_id(mark)
        is_one = index in self._added or isinstance(self._tokenizer.model, tokenizers.models.WordLevel)
        return index if is_one else None

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(ids)).decode(errors="replace")

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(piece) for piece in self.token_bytes(ids)]
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts

    def token_bytes(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[bytes]:
        first, pieces = self._begins(before), []
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} lies outside the vocabulary of {self.vocab_size}")
            pieces.append(self._piece(index, first))
            if index not in self._control:
                first = self._by_line and pieces[-1].endswith(b"\n")
        return pieces

    def save(self, folder: str | pathlib.Path) -> None:
        save_files(json.loads(self._tokenizer.to_str()), folder, self, self._tokenizer.id_to_token, self._template)

    def _encode_checked(self, text: str) -> tuple[int, ...]:
        """Return ids that write `text` where one begins; in two parts where they do not give back the whole."""
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if self.decode(ids) == text:
            return ids
        with contextlib.suppress(ValueError):
            if len(text) == 1:
                return tuple(self._bytes_of(text))
            middle = len(text) // 2
            return (*self._encode_checked(text[:middle]), *self._continue(text[middle:]))
        what = "line" if self._by_line else "text"
        raise ValueError(f"the tokenizer does not give back the {what} {text!r}, but {self.decode(ids)!r}")

    def _encode_after_text(self, text: str) -> list[int]:
        """Return ids that write `text` after other text, cut as after one of `_ANCHORS`.

        Text that a tokenizer changes, as it reads special tokens or normalises, is written in two parts, and a single
        character at last in bytes.
        """
        for anchor in _ANCHORS:
            ids = self._tokenizer.encode(anchor + text, add_special_tokens=False).ids
            pieces = [self._piece(index, place == 0) for place, index in enumerate(ids)]
            ends = itertools.accumulate(map(len, pieces))
            count = next((count for count, end in enumerate(ends, start=1) if end == len(anchor)), len(ids))
            if b"".join(self._piece(index, False) for index in ids[count:]) == text.encode():
                return ids[count:]
        middle = len(text) // 2
        return [*self._continue(text[:middle]), *self._continue(text[middle:])] if middle else self._bytes_of(text)

    def _bytes_of(self, text: str) -> list[int]:
        """Return the tokens of a text's bytes. Raises ValueError for a tokenizer that lacks one."""
        byte_level = {byte: char for char, byte in _BYTE_OF.items()} if "ByteLevel" in self._decoders else None
        names = [f"<0x{byte:02X}>" if byte_level is None else byte_level[byte] for byte in text.encode()]
        ids: list[int] = [index for name in names if (index := self._tokenizer.token_to_id(name)) is not None]
        if b"".join(self._piece(index, False) for index in ids) != text.encode():
            raise ValueError(f"the tokenizer cannot write {text!r}")
        return ids

    def _begins(self, before: Sequence[int]) -> bool:
        """Tell whether what follows these tokens begins a text that is encoded on its own."""
        last = next((index for index in reversed(before) if index not in self._control), None)
        return last is None or (self._by_line and self._piece(last, False).endswith(b"\n"))

    def _count_bos(self, stated: Stated) -> int:
        """Count the BOS that the tokenizer puts before a text. One that nothing is said of puts one."""
        config = stated.get("tokenizer_config.json")
        said = None if config is None else config.get("add_bos_token")
        own: list[int] = self._tokenizer.encode("").ids
        return int(bool(said) if said is not None else own[:1] == [self.bos_id] or config is None)

    def _spell(self, index: int, first: bool) -> bytes:
        """Return a token's UTF-8, where it is the first of a text or not."""
        token = self._tokenizer.id_to_token(index)
        if token is None or index in self._control:
            return b""
        if "ByteLevel" in self._decoders:
            values = [_BYTE_OF.get(char) for char in token]
            return token.encode() if None in values else bytes(values)  # type: ignore[arg-type]
        byte = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in self._decoders else None
        if byte and int(byte[1], 16) >= 0x80:  # a part of a character; others are text
            return bytes([int(byte[1], 16)])
        return self._join([token] if first else ["a", token]).removeprefix("" if first else self._join(["a"])).encode()

    def _join(self, tokens: list[str]) -> str:
        """Return the text of tokens that stand at the beginning of one."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)


def _load_gguf(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, Stated]:
    from apr_jax.data.gguf_tokenizer import read_gguf_tokenizer

    try:
        return read_gguf_tokenizer(open_gguf(path).metadata)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _load(path: pathlib.Path) -> tokenizers.Tokenizer:
    path = file_in(path.parent, path.name)
    data = path.read_bytes()
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # how the library's bugs end
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path}: no tokenizer that the library reads ({reason}); fetch the file again") from error
