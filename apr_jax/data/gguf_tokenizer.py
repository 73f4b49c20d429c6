"""The tokenizer in a GGUF file's metadata: to a `tokenizers.Tokenizer` and back.

llama.cpp knows two kinds: byte-level BPE ("gpt2"), whose ways to cut text into words have names, and SentencePiece's
BPE ("llama"), whose merges follow from its scores. The expressions are those of llama.cpp's llama-vocab.cpp. A file may
hold a whole tokenizer.json besides, which is then the one that is read.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from apr_jax.config import ConfigError
from apr_jax.data.special_tokens import Stated
from apr_jax.gguf_file import WHOLE_TOKENIZER

_SPACE = "\u2581"
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6  # types of tokens

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",)
_LLAMA3 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",)
_QWEN2 = (_LLAMA3[0].replace("{1,3}", ""),)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_REST}",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
    r"\p{N}",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, r"[0-9][0-9][0-9]")
_DIGITS = (r"\p{N}", *_GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# How each kind of pre-tokenizer cuts text, one expression after the other.
_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), _GPT2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
    "deepseek-v3": _DEEPSEEK3,
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": _FALCON,
    "default": _DEFAULT,
}
# Kinds in which a word that is a token is not built from merges; they also begin with BOS, unless the file says no.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_PREFIX = "tokenizer.ggml."
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}
# Text that kinds of pre-tokenizers cut in different ways.
_PROBE = (
    "Hello, y'all! I'M 3 and it's 12345 dollars ($3.50)\n\n  So  what?\r\n\t x = y_1 + fooBar/baz; HTTPServer <=> "
    "\u00dcber \u4f60\u597d \u3072\u3089 e\u0301 \U0001f680\U0001f680 a1b2 --\n 'Twas ... \u0661\u0662\u0663\u0664   "
)


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, Stated]:
    """Make the tokenizer that a GGUF's metadata describe, and what a Hugging Face folder would state of it.

    Raises:
        ConfigError: there is none, or one that this project cannot make.
    """
    own = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    whole = metadata.get(WHOLE_TOKENIZER)
    try:
        tokenizer = _make(own) if whole is None else tokenizers.Tokenizer.from_str(whole)
    except ConfigError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # how the library's bugs end
            raise
        raise ConfigError(f"its tokenizer does not load ({str(error).partition(chr(10))[0]})") from error
    stated = _state(tokenizer, own, metadata.get("tokenizer.chat_template"))
    config = stated["tokenizer_config.json"]
    if config["add_bos_token"] and "bos_token" in config and whole is None:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, own["bos_token_id"])]
        )
    return tokenizer, stated


def write_gguf_tokenizer(
    tokenizer_json: Mapping[str, Any], stated: Stated, num_ids: int = 0
) -> tuple[dict[str, Any], str]:
    """Return the metadata of a tokenizer, and the reason why llama.cpp cannot read text with it; "" where it can.

    Args:
        tokenizer_json: the content of its tokenizer.json.
        stated: what its folder states of it.
        num_ids: the model's rows of embeddings, which may be more than it has tokens.
    """
    whole = json.dumps(tokenizer_json)
    tokenizer = tokenizers.Tokenizer.from_str(whole)
    own, reason = _describe(tokenizer, tokenizer_json, num_ids)
    config = stated.get("tokenizer_config.json", {})
    for role, key in _IDS.items():
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, Mapping) else text
        if text is not None and (index := tokenizer.token_to_id(text)) is not None:
            own[f"{key}_token_id"] = index
    ends = stated.get("generation_config.json", {}).get("eos_token_id")
    others = [index for index in (ends if isinstance(ends, list) else []) if index != own.get("eos_token_id")]
    if others:
        own["eot_token_id"] = others[0]
    own["add_bos_token"] = bool(config.get("add_bos_token", False))
    metadata = {_PREFIX + key: value for key, value in own.items()} | {WHOLE_TOKENIZER: whole}
    if isinstance(config.get("chat_template"), str):
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata, reason


def _make(own: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make a tokenizer from llama.cpp's description."""
    if own.get("model") not in ("gpt2", "llama"):
        raise ConfigError(f"tokenizer.ggml.model={own.get('model')!r} is not supported; those here are gpt2 and llama")
    tokens, types = own.get("tokens"), own.get("token_type")
    if not isinstance(tokens, list) or not tokens or len(set(tokens)) != len(tokens):
        raise ConfigError("tokenizer.ggml.tokens must list the vocabulary's tokens, each once")
    kinds = [1] * len(tokens) if types is None else [int(kind) for kind in types]
    if len(kinds) != len(tokens):
        raise ConfigError(f"tokenizer.ggml.token_type has {len(kinds)} values for {len(tokens)} tokens")
    tokenizer = _byte_level(own, tokens) if own["model"] == "gpt2" else _sentencepiece(own, tokens, kinds)
    for wanted in (_CONTROL, _USER_DEFINED):
        texts = [text for text, kind in zip(tokens, kinds, strict=True) if kind == wanted and text]
        tokenizer.add_tokens(
            [tokenizers.AddedToken(text, normalized=False, special=wanted == _CONTROL) for text in texts]
        )
    return tokenizer


def _state(tokenizer: tokenizers.Tokenizer, own: Mapping[str, Any], template: Any) -> Stated:
    """Return the special tokens as a Hugging Face folder states them."""
    ids = {role: own[f"{key}_token_id"] for role, key in _IDS.items() if own.get(f"{key}_token_id") is not None}
    for role, index in ids.items():
        if type(index) is not int or index < 0 or tokenizer.id_to_token(index) is None:
            raise ConfigError(f"tokenizer.ggml.{_IDS[role]}_token_id={index!r} is no id of its tokens")
    config: dict[str, Any] = {f"{role}_token": tokenizer.id_to_token(ids[role]) for role in ids if role != "eot"}
    if isinstance(template, str):
        config["chat_template"] = template
    config["add_bos_token"] = bool(
        own.get("add_bos_token", own.get("model") == "llama" or own.get("pre") in _WHOLE_WORDS)
    )
    ends = [ids[role] for role in ("eos", "eot") if role in ids]
    return {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": ends}}


def _byte_level(own: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    name, merges = own.get("pre", "default"), own.get("merges")
    if name not in _WORDS:
        raise ConfigError(f"tokenizer.ggml.pre={name!r} is not supported; those here are {', '.join(sorted(_WORDS))}")
    if not isinstance(merges, list):
        raise ConfigError("tokenizer.ggml.merges is missing")
    pairs = [(merge[: (place := merge.find(" ", 1))], merge[place + 1 :]) for merge in merges]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({text: index for index, text in enumerate(tokens)}, pairs, ignore_merges=name in _WHOLE_WORDS)
    )
    tokenizer.pre_tokenizer = _cuts(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _cuts(name: str) -> pre_tokenizers.PreTokenizer:
    """Return what cuts text into words as llama.cpp's pre-tokenizer of this name does."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(expression), "isolated") for expression in _WORDS[name]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(own: Mapping[str, Any], tokens: list[str], kinds: Sequence[int]) -> tokenizers.Tokenizer:
    scores = own.get("scores")
    if scores is None or len(scores) != len(tokens):
        raise ConfigError(f"tokenizer.ggml.scores must hold a number for each of {len(tokens)} tokens")
    unknown = own.get("unknown_token_id", 0)
    vocabulary = {text: index for index, text in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, dict(zip(tokens, map(float, scores), strict=True))),
            unk_token=tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    prefixes = bool(own.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixes else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixes else steps)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary: each way to make a token of two, the highest score first."""
    found = []
    for text, score in scores.items():
        cuts = [(text[:place], text[place:]) for place in range(1, len(text))]
        known = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, *pair) for pair in known]
    found.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    return [(left, right) for _, left, right in found]


def _describe(tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], num_ids: int) -> tuple[dict[str, Any], str]:
    """Return llama.cpp's description of a tokenizer, and the reason where there is none."""
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model["type"] != "BPE":
        return {"model": "none"}, f"llama.cpp knows no {model['type']} tokenizer"
    size = max(num_ids, 1 + max((*model["vocab"].values(), *added)))
    tokens = [tokenizer.id_to_token(index) or f"[PAD{index}]" for index in range(size)]
    types = [_type(tokenizer.id_to_token(index), added.get(index)) for index in range(size)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    own = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges, start=1)))}
        begins = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        own |= {"model": "llama", "scores": [-float(ranks.get(text, 0)) for text in tokens]}
        return own | {"add_space_prefix": begins != ["a"]}, ""
    name = _pre_tokenizer(tokenizer, bool(model.get("ignore_merges")))
    if name is None:
        return {"model": "none"}, "llama.cpp has no pre-tokenizer that cuts text as this tokenizer does"
    return own | {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}, ""


def _type(text: str | None, added: Mapping[str, Any] | None) -> int:
    if text is None:
        return _UNUSED
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    return _BYTE if len(text) == 6 and text.startswith("<0x") else 1


def _pre_tokenizer(tokenizer: tokenizers.Tokenizer, takes_whole_words: bool) -> str | None:
    """Return the name of the pre-tokenizer that cuts text as this tokenizer does, or None."""
    if tokenizer.pre_tokenizer is None or tokenizer.normalizer is not None:
        return None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(_PROBE)
    alike = [name for name in _WORDS if _cuts(name).pre_tokenize_str(_PROBE) == pieces]
    return next((name for name in alike if (name in _WHOLE_WORDS) == takes_whole_words), None)
