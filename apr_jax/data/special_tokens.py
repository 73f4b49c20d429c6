"""BOS, EOS and padding of a Hugging Face tokenizer: read from what its folder states, as transformers 5 reads it.

The tokenizer's own tokens stand in tokenizer_config.json, over which an old special_tokens_map.json has precedence
unless the former lists its `added_tokens_decoder`. The ids at which decoding stops stand in generation_config.json,
else in config.json, and may be several. The tokenizer's own EOS is what training appends, so it is a stop as well.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apr_jax.config import ConfigError
from apr_jax.files import file_in, read_json
from apr_jax.paths import is_there

_MOST_STOPS = 6
# Usual names, for a tokenizer.json that nothing stands beside. They decide only where the vocabulary has one of them.
_USUAL = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[EOS]", "<|endoftext|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}


Stated = Mapping[str, Mapping[str, Any]]  # JSON objects by the name of their file in a Hugging Face folder
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


class SpecialTokens(NamedTuple):
    """The ids of a tokenizer's special tokens."""

    bos: int
    eos: tuple[int, ...]  # the first is the one that training appends; each of them ends a thread
    pad: int


def stated_beside(path: pathlib.Path) -> Stated:
    """Read the files beside the tokenizer.json at `path`. Raises FileError where one is damaged."""
    advice = f"fetch the file again, or remove it to go by {path.name} alone"
    stated = {name: read_json(file_in(path.parent, name), advice) for name in _FILES if is_there(path.parent / name)}
    template = path.parent / "chat_template.jinja"
    if template.exists():
        config = stated.get("tokenizer_config.json", {})
        stated["tokenizer_config.json"] = {**config, "chat_template": template.read_text(encoding="utf-8")}
    return stated


def read_special_tokens(path: pathlib.Path, vocabulary: Mapping[str, int], stated: Stated) -> SpecialTokens:
    """Read the special tokens of the tokenizer at `path` from what is stated of it.

    Raises:
        ConfigError: no BOS or EOS is stated, one that the vocabulary lacks, or something that is no token.
    """
    found = {name: stated.get(name, {}) for name in _FILES}
    own = [found["tokenizer_config.json"]]
    if "added_tokens_decoder" not in own[0]:
        own.insert(0, found["special_tokens_map.json"])
    reader = _Reader(path, vocabulary)

    def of_generation(role: str) -> tuple[int, ...]:
        """Return the ids by which generation knows a role."""
        for name in ("generation_config.json", "config.json"):
            if ids := reader.ids(found[name].get(f"{role}_token_id"), f"{name}: {role}_token_id"):
                return ids
        return ()

    def of_tokenizer(role: str) -> tuple[int, ...]:
        values = (values.get(f"{role}_token") for values in own)
        return reader.token(next((value for value in values if value is not None), None), f"{role}_token")

    bos = of_tokenizer("bos") or of_generation("bos") or reader.usual("bos")
    eos = tuple(dict.fromkeys((*of_tokenizer("eos"), *of_generation("eos")))) or reader.usual("eos")
    for role, ids in (("bos", bos), ("eos", eos)):
        if not ids:
            raise ConfigError(
                f"{path}: no {role.upper()} token is stated; name it as {role}_token in tokenizer_config.json"
            )
    if len(eos) > _MOST_STOPS:
        raise ConfigError(
            f"{path.parent}: {len(eos)} EOS ids, and at most {_MOST_STOPS} can be matched; leave some out"
        )
    try:
        pad = of_tokenizer("pad") or of_generation("pad")
    except ConfigError:  # such as -1 in Llama's first folders: no model reads padding, so any token will do
        pad = ()
    return SpecialTokens(bos[0], eos, (pad or reader.usual("pad") or eos)[0])


class _Reader:
    """A reader of statements about tokens as ids of a vocabulary."""

    def __init__(self, path: pathlib.Path, vocabulary: Mapping[str, int]) -> None:
        self._path, self._vocabulary = path, vocabulary
        self._ids = frozenset(vocabulary.values())

    def token(self, value: Any, key: str) -> tuple[int, ...]:
        """Return the id of a token, which is written as text or as an object with its `content`."""
        content = value.get("content") if isinstance(value, dict) else value
        if value is None:
            return ()
        if not isinstance(content, str) or content not in self._vocabulary:
            raise ConfigError(
                f"{self._path.parent}: {key}={content!r} is no token of {self._path.name}; name one that is in "
                "tokenizer_config.json, or fetch the folder again"
            )
        return (self._vocabulary[content],)

    def ids(self, value: Any, where: str) -> tuple[int, ...]:
        """Return what is one id, a list of ids or null."""
        ids: Sequence[Any] = () if value is None else value if isinstance(value, list) else [value]
        for index in ids:
            if type(index) is not int or index not in self._ids:
                raise ConfigError(
                    f"{self._path.parent}/{where}={value!r}: {index!r} is no id of {self._path.name}; name one that "
                    "is, or fetch the folder again"
                )
        return tuple(ids)

    def usual(self, role: str) -> tuple[int, ...]:
        """Return the id of the one usual name that the vocabulary has; nothing where it has several of them or none."""
        names: Iterable[str] = [name for name in _USUAL[role] if name in self._vocabulary]
        ids = tuple(self._vocabulary[name] for name in names)
        return ids if len(ids) == 1 or role == "pad" else ()
