"""Hugging Face's config.json to a `ModelConfig` and back. What `llama.py` does not compute is refused by name."""

from collections.abc import Mapping
from typing import Any

from apr_jax.config import ModelConfig, RopeScaling
from apr_jax.model.families import FAMILIES, by_model_type
from apr_jax.model.weights.errors import HuggingFaceError

TRAINED = "apr_jax.json"  # the file, in folders that this project writes, with the configuration of the training

_REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
# Types of the values that are read here. A number may be written as a whole one.
_TYPES: dict[type, str] = {
    int: "num_key_value_heads head_dim sliding_window original_max_position_embeddings",
    float: "rope_theta rms_norm_eps partial_rotary_factor factor low_freq_factor high_freq_factor",
    bool: "tie_word_embeddings attention_bias mlp_bias use_sliding_window",
    str: "model_type hidden_act rope_type type",
    list: "layer_types",
    dict: "rope_parameters rope_scaling quantization_config",
}
_TYPE_OF = {key: kind for kind, keys in _TYPES.items() for key in keys.split()} | dict.fromkeys(_REQUIRED, int)
_KINDS = {
    int: "a whole number from 1 to 2,147,483,647",
    float: "a number above 0",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}
_LARGEST = 1 << 31
# Fields of RopeScaling, and their names in config.json.
_LLAMA3 = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
_ROPE_TYPES = ("default", "llama3")


def read_config(given: Mapping[str, Any], **settings: Any) -> ModelConfig:
    """Read config.json's values; `settings` are the fields that Hugging Face has no word for.

    Where a key is missing, transformers' default for the family counts (tests/model/weights compares).

    Raises:
        HuggingFaceError: a key is missing, asks for what no family here has, or contradicts another.
    """
    _check_types(given)
    family = by_model_type(given.get("model_type", "llama"))
    if family is None:
        known = ", ".join(repr(facts.model_type) for facts in FAMILIES.values())
        raise HuggingFaceError(
            f"config.json: model_type={given['model_type']!r} is not supported; the families here are {known}"
        )
    values = dict(FAMILIES[family].silent) | dict(given)
    _check_supported(family, values)
    if missing := [key for key in _REQUIRED if values.get(key) is None]:
        raise HuggingFaceError(f"config.json: {missing[0]} is missing")
    num_heads = values["num_attention_heads"]
    if values.get("head_dim") is None and values["hidden_size"] % num_heads:
        raise HuggingFaceError(
            f"config.json: hidden_size={values['hidden_size']} must be a multiple of num_attention_heads={num_heads}, "
            "because head_dim is missing"
        )
    rope = _read_rope(given, values)
    return ModelConfig(
        family=family,
        vocab_size=values["vocab_size"],
        num_layers=values["num_hidden_layers"],
        embed_dim=values["hidden_size"],
        mlp_dim=values["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=_either(values.get("num_key_value_heads"), num_heads),
        head_dim=_either(values.get("head_dim"), values["hidden_size"] // num_heads),
        max_seq_len=values["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", values["rope_theta"])),
        rope_scaling=_read_scaling(rope, values),
        rms_norm_eps=float(_either(values["rms_norm_eps"], FAMILIES[family].silent["rms_norm_eps"])),
        tie_embeddings=bool(values["tie_word_embeddings"]),
        **settings,
    )


def _check_types(given: Mapping[str, Any]) -> None:
    """Check the type of each value that is read, in RoPE's settings as well. null stands for a key that is missing."""
    for key, value in given.items():
        kind = _TYPE_OF.get(key)
        if kind is None or value is None:
            continue
        if kind in (int, float):
            fits = type(value) in {int, kind} and 0 < value < (_LARGEST if kind is int else float("inf"))
        else:
            fits = type(value) is kind
        if not fits:
            raise HuggingFaceError(f"config.json: {key}={value!r} must be {_KINDS[kind]}; fetch the file again")
        if key in ("rope_parameters", "rope_scaling"):
            _check_types(value)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json's values, in the words of transformers 4 and 5 alike."""
    facts, scaling = FAMILIES[config.family], config.rope_scaling
    stretched = {} if scaling is None else {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3.items()}
    kind = {"rope_type": "default" if scaling is None else "llama3", **stretched}
    return {
        "architectures": [facts.architecture],
        "model_type": facts.model_type,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_parameters": {**kind, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **facts.written,
    }


def _check_supported(family: str, values: Mapping[str, Any]) -> None:
    written = FAMILIES[family].written
    biases = [(key, written.get(key, False)) for key in ("attention_bias", "mlp_bias")]
    for key, supported in (("hidden_act", "silu"), *biases):
        if values.get(key, supported) != supported:
            raise HuggingFaceError(f"config.json: {key}={values[key]!r} is not supported, only {supported!r}")
    window = values.get("sliding_window") if values.get("use_sliding_window", family == "mistral") else None
    longest = values.get("max_position_embeddings") or 0
    if window is not None and window < longest:
        raise HuggingFaceError(
            f"config.json: sliding_window={window} is not supported for a context of {longest}; set "
            f"max_position_embeddings to at most {window}, below which the window hides nothing"
        )
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    if kinds and window is None:
        raise HuggingFaceError(f"config.json: layer_types names {min(kinds)!r}; only 'full_attention' is supported")
    if values.get("quantization_config"):
        raise HuggingFaceError("config.json: quantization_config: quantised weights are not supported; dequantise them")


def _read_rope(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's settings: `rope_parameters` of transformers 5, or `rope_scaling` of transformers 4."""
    new, old = (dict(given.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    for rope in (new, old):
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
    own = {"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else {}
    for name, other in (("rope_scaling", old), ("rope_theta", own)):
        for key in new.keys() & other.keys():
            if new[key] != other[key]:
                raise HuggingFaceError(
                    f"config.json: rope_parameters says {key}={new[key]!r} and {name} says {other[key]!r}; remove one"
                )
    if new and old and old.get("rope_type", "default") != new.get("rope_type", "default"):
        raise HuggingFaceError(
            f"config.json: rope_parameters={new} and rope_scaling={old} contradict each other; remove one"
        )
    rope = old | new
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise HuggingFaceError(f"config.json: rope_type={kind!r} is not supported, only {' and '.join(_ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise HuggingFaceError(f"config.json: partial_rotary_factor={partial} is not supported")
    return rope


def _read_scaling(rope: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling | None:
    if rope.get("rope_type", "default") == "default":
        return None
    rope = {"original_max_position_embeddings": values["max_position_embeddings"]} | dict(rope)
    if missing := [theirs for theirs in _LLAMA3.values() if rope.get(theirs) is None]:
        raise HuggingFaceError(f"config.json: {missing[0]} is missing from RoPE's settings of rope_type='llama3'")
    numbers = {ours: rope[theirs] for ours, theirs in _LLAMA3.items()}
    return RopeScaling(
        factor=float(numbers["factor"]),
        low_frequency_factor=float(numbers["low_frequency_factor"]),
        high_frequency_factor=float(numbers["high_frequency_factor"]),
        original_max_seq_len=int(numbers["original_max_seq_len"]),
    )


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value
