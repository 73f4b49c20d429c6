"""Text to token ids and back: one protocol, the built-in closed vocabulary, and the door to Hugging Face tokenizers.

Every tokenizer here is lossless: `decode(encode(text)) == text`, or `encode` raises ValueError. What a thread has
written stays as its tokens; text is added to it by `encode_continuation`. Where each line is encoded on its own
(`Spelling.encoding`) a newline only ends a token, so if `a` ends in one, `encode(a + b) == encode(a) + encode(b)`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from apr_jax.config import Config
from apr_jax.files import write, write_json
from apr_jax.paths import path_of
from apr_jax.tasks import task_of
from apr_jax.tasks.countdown.vocabulary import LATER_PHRASES, PHRASES
from apr_jax.tasks.dialect import JOIN_BEGIN, SpawnDialect
from apr_jax.tasks.word_level import word_level

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
LARGEST_NUMBER = 255  # the largest number that is one token; larger ones are spelt in digit tokens
SYMBOLS = tuple("#,:[]'+-*/=<> \n")  # single characters; letters occur only inside phrases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """The choices of `config.data` on how a tokenizer.json spells text, with what the task's dialects need.

    Where lines are encoded on their own, each as if it were a whole text, no token spans a newline. A whole text is cut
    as its tokenizer would cut it, and what is added to a thread later as after other text.
    """

    markers: tuple[str, ...] = ()  # to be added as tokens where the vocabulary lacks them
    joins: tuple[str, ...] = (JOIN_BEGIN,)  # the marks that begin a join
    encoding: Literal["lines", "whole"] = "lines"
    num_bos: int | None = None  # BOS tokens before a prompt; None: as many as the tokenizer's own files say
    chat: bool = False  # a prompt is a user's message, written by the tokenizer's chat template if it has one

    @classmethod
    def of(cls, config: Config) -> "Spelling":
        """Return what a configuration asks for."""
        data, task = config.data, task_of(config)
        joins = [each.join_begin for each in task.dialects.values() if isinstance(each, SpawnDialect)]
        return cls(
            markers=task.marks if data.add_marker_tokens else (),
            joins=tuple(dict.fromkeys(joins)),
            encoding=data.encoding,
            num_bos={"auto": None, "none": 0, "once": 1, "twice": 2}[data.bos],
            chat=data.chat_template == "auto",
        )


AS_IS = Spelling()


class Tokenizer(Protocol):
    """The part of a tokenizer that the rest of apr_jax knows."""

    vocab_size: int  # ids are 0..vocab_size - 1
    unused_ids: tuple[int, ...]  # ids among them that no token has
    pad_id: int
    bos_id: int
    eos_id: int  # that training appends
    eos_ids: tuple[int, ...]  # that end a thread: `eos_id`, and others where a Hugging Face folder states several
    num_bos: int  # that stand before a prompt, where a configuration does not ask for another number
    join_ids: tuple[int, ...]  # tokens that begin a join: only the engine writes them
    chats: bool  # a prompt is a user's message in the tokenizer's own template

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS or EOS. Raises ValueError where `text` would not come back."""

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that a thread with this prompt begins with, BOS included. Raises ValueError as `encode`."""

    def encode_continuation(self, text: str, before: Sequence[int]) -> list[int]:
        """Return ids that write `text` after the tokens `before`, with nothing between: no blank of a new beginning.

        `decode([*before, *ids]) == decode(before) + text`. Raises ValueError where `text` would not come back.
        """

    def mark_id(self, mark: str) -> int | None:
        """Return the one token that always spells a mark; None where other tokens may, too, or there is no such token.

        An added token of a Hugging Face tokenizer is one, and a piece that merges made is not.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids; control tokens (pad, BOS, EOS) have none. ValueError: an id out of range."""

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return a piece for each id, joined `decode(ids)`; a character belongs to the token that completes it."""

    def token_bytes(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[bytes]:
        """Return the UTF-8 of each id, where the ids follow the tokens `before`; a token may hold part of a character.

        Joined, and with U+FFFD for what is no UTF-8, they are `decode`'s text.
        """

    def save(self, folder: str | pathlib.Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, whose ids `transformers` takes."""


class BuiltinTokenizer:
    """The closed vocabulary of the trace grammar: phrases, the numbers 0..255, and symbols, as one token each.

    Encoding takes the longest phrase at each place. A maximal run of digits is a number token where it is the canonical
    spelling of a number up to 255, else one digit token per digit (digit tokens are not number tokens). Any text that
    is made of tokens is encoded, also where the longest phrase leads astray; other text raises ValueError.
    """

    def __init__(self, num_bos: int | None = None) -> None:
        """Make the vocabulary; `num_bos` as of `Spelling`."""
        digits = [str(digit) for digit in range(10)]
        numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
        self._texts = ["", "", "", *PHRASES, *SYMBOLS, *digits, *numbers, *LATER_PHRASES]
        self._bytes = [text.encode() for text in self._texts]
        self._first_digit = 3 + len(PHRASES) + len(SYMBOLS)
        self._ids = {text: index for index, text in enumerate(self._texts) if text}  # a number wins over its digit
        self.vocab_size = len(self._texts)
        self.unused_ids: tuple[int, ...] = ()
        self.pad_id, self.bos_id, self.eos_id = 0, 1, 2
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        self.join_ids: tuple[int, ...] = (self._ids[JOIN_BEGIN],)
        self.num_bos, self.chats = 1, False
        self._begin = [self.bos_id] * (self.num_bos if num_bos is None else num_bos)
        self._by_length = sorted((*PHRASES, *LATER_PHRASES, *SYMBOLS), key=len, reverse=True)
        self._find = re.compile("|".join(["[0-9]+", *map(_guarded, self._by_length)])).findall

    def encode(self, text: str) -> list[int]:
        ids = self._encode_greedily(text)
        if ids is not None:
            return ids
        result = []
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            ids = self._encode_greedily(line)
            result += self._encode_searching(line) if ids is None else ids
        return result

    def encode_prompt(self, text: str) -> list[int]:
        return [*self._begin, *self.encode(text)]

    def encode_continuation(self, text: str, before: Sequence[int]) -> list[int]:
        return self.encode(text)

    def mark_id(self, mark: str) -> int | None:
        return self._ids.get(mark)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.token_texts(ids))

    def token_bytes(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[bytes]:
        self._check(ids)
        return [self._bytes[index] for index in ids]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        self._check(ids)
        return [self._texts[index] for index in ids]

    def save(self, folder: str | pathlib.Path) -> None:
        save_files(self._to_json(), folder, self, [PAD, BOS, EOS].__getitem__)

    def _check(self, ids: Sequence[int]) -> None:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} lies outside the vocabulary of {self.vocab_size}")

    def _encode_greedily(self, text: str) -> list[int] | None:
        """Take the longest phrase at each place; return None where that fails."""
        pieces = self._find(text)
        if sum(map(len, pieces)) != len(text):
            return None
        ids = list(map(self._ids.get, pieces))
        if None not in ids:
            return ids  # type: ignore[return-value]
        return [index for piece in pieces for index in self._piece_ids(piece)]

    def _piece_ids(self, piece: str) -> list[int]:
        index = self._ids.get(piece)
        return [self._first_digit + int(digit) for digit in piece] if index is None else [index]

    def _encode_searching(self, line: str) -> list[int]:
        """Search all ways to cut the line into tokens, the longest first. For text no solver renders."""
        ends: list[list[int]] = [[] for _ in line]  # per place, where a token (or a run of digits) from there may end
        for place, char in enumerate(line):
            if "0" <= char <= "9":
                ends[place] = [place + len(re.match("[0-9]+", line[place:]).group())]  # type: ignore[union-attr]
            else:
                ends[place] = [place + len(text) for text in self._by_length if line.startswith(text, place)]
        can_finish = [False] * len(line) + [True]
        for place in reversed(range(len(line))):
            can_finish[place] = any(can_finish[end] for end in ends[place])
        place, ids = 0, []
        while place < len(line):
            end = next((end for end in ends[place] if can_finish[end]), None)
            if end is None:
                raise ValueError(_unknown_character(line, ends))
            ids += self._piece_ids(line[place:end])
            place = end
        return ids

    def _to_json(self) -> dict[str, Any]:
        """Return this vocabulary in the `tokenizers` format: long runs' digits renamed, a splitting regex, words."""
        names = [PAD, BOS, EOS, *self._texts[3:]]
        names[self._first_digit : self._first_digit + 10] = list(_RENAMED_DIGITS)
        renames = [
            {"type": "Replace", "pattern": {"Regex": _in_long_run(digit)}, "content": _RENAMED_DIGITS[digit]}
            for digit in range(10)
        ]
        undo = [
            {"type": "Replace", "pattern": {"String": _RENAMED_DIGITS[digit]}, "content": str(digit)}
            for digit in range(10)
        ]
        split = "|".join([f"[{_RENAMED_DIGITS}]", "[0-9]+", *map(_guarded, self._by_length)])
        return word_level(names, len((PAD, BOS, EOS)), split, normalizers=renames, decoders=undo)


def config_tokenizer(config: Config, spec: str | None = None) -> Tokenizer:
    """Load the tokenizer of a configuration, or another one under its choices. Raises as `load_tokenizer`."""
    return load_tokenizer(config.data.tokenizer if spec is None else spec, Spelling.of(config))


def load_tokenizer(spec: str, spelling: Spelling = AS_IS) -> Tokenizer:
    """Load the tokenizer that `spec` names: "builtin", or the path of a Hugging Face tokenizer.json.

    Raises FileNotFoundError for a path that is not there, ValueError for a tokenizer without BOS or EOS.
    """
    if spec == "builtin":
        return BuiltinTokenizer(spelling.num_bos)
    from apr_jax.data.hf_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(spec, spelling)


def token_counter(config: Config) -> Callable[[str], int]:
    """Return what counts a text's tokens by a configuration's tokenizer. It pickles."""
    return functools.partial(_count_tokens, config.data.tokenizer, Spelling.of(config))


def _count_tokens(spec: str, spelling: Spelling, text: str) -> int:
    return len(_cached_tokenizer(spec, spelling).encode(text))


_cached_tokenizer = functools.cache(load_tokenizer)


def save_files(
    tokenizer_json: dict[str, Any],
    folder: str | pathlib.Path,
    tokenizer: Tokenizer,
    name_of: Callable[[int], str | None],
    chat_template: Any = None,
) -> None:
    """Write tokenizer.json, and beside it the special tokens: by name for the tokenizer, by id for generation.

    `chat_template` is that of tokenizer_config.json, None for none.
    """
    folder = path_of(folder)
    write(folder / "tokenizer.json", (json.dumps(tokenizer_json, indent=1, ensure_ascii=False) + "\n").encode())
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    names = {f"{role}_token": name_of(index) for role, index in ids.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    config["add_bos_token"] = tokenizer.num_bos > 0
    config |= {} if chat_template is None else {"chat_template": chat_template}
    write_json(folder / "tokenizer_config.json", config)
    several = {"eos": list(tokenizer.eos_ids)} if len(tokenizer.eos_ids) > 1 else {}
    generation = {f"{role}_token_id": value for role, value in (ids | several).items()}
    write_json(folder / "generation_config.json", generation)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return sixteen hex digits that are equal where text becomes the same ids, with the same special tokens.

    They don't depend on a tokenizer's class or on the layout of its files.
    """
    import tokenizers  # slow to import, and the built-in vocabulary does without it

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer.save(folder)
        content = json.loads(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).to_str())
        generation = json.loads((folder / "generation_config.json").read_bytes())
    for key in ("version", "truncation", "padding", "post_processor"):  # encoding uses none of these
        content.pop(key, None)
    return hashlib.blake2b(json.dumps([content, generation]).encode(), digest_size=8).hexdigest()


def _guarded(phrase: str) -> str:
    """Return the phrase as a regex that does not cut a run of digits in two."""
    return re.escape(phrase) + ("(?![0-9])" if phrase[-1].isdigit() else "")


def _unknown_character(line: str, ends: list[list[int]]) -> str:
    reached = {0}
    for place in range(len(line)):
        if place in reached:
            reached.update(ends[place])
    place = max(place for place in reached if place < len(line))
    return (
        f"the built-in vocabulary cannot write the character {line[place]!r} at place {place} of the line {line!r}: "
        "letters occur only in the trace grammar's phrases"
    )


# tokenizer.json maps each text to one id, so the digit tokens need names of their own there:
# the fullwidth digits.
_RENAMED_DIGITS = "".join(chr(0xFF10 + digit) for digit in range(10))


def _in_long_run(digit: int) -> str:
    """Return a regex for `digit` inside a maximal run of digits that is not the canonical spelling of 0..255.

    Lookbehind of bounded length only. Neighbours may have been renamed already.
    """

    def among(low: int, high: int) -> str:
        return f"[{low}-{high}{_RENAMED_DIGITS[low]}-{_RENAMED_DIGITS[high]}]"

    any_, end = among(0, 9), f"(?!{among(0, 9)})"
    start = "[^0-9" + _RENAMED_DIGITS + "]"
    patterns = [f"(?<={any_ * before}){digit}(?={any_ * (3 - before)})" for before in range(4)]  # four digits or more
    runs = [[(0, 0), (0, 9)], [(0, 0), (0, 9), (0, 9)]]  # a leading zero
    runs += [[(3, 9), (0, 9), (0, 9)], [(2, 2), (6, 9), (0, 9)], [(2, 2), (5, 5), (6, 9)]]  # three digits above 255
    for run in runs:
        for place, (low, high) in enumerate(run):
            if low <= digit <= high:
                before = "".join(among(*span) for span in run[:place])
                after = "".join(among(*span) for span in run[place + 1 :])
                patterns.append(f"(?<=^{before}|{start}{before}){digit}(?={after}{end})")
    return "|".join(patterns)
