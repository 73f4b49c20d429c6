"""GGUF files as models: llama.cpp's words for a configuration and its names of tensors, turned into Hugging Face's.

llama.cpp rotates neighbouring pairs in models of its architecture "llama", so their rows of query and key are stored in
another order (`FamilyFacts.gguf_pairs`). Llama 3's stretched RoPE is stored as the divisor of each frequency.
"""

import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from apr_jax.config import ConfigError, ModelConfig, RopeScaling
from apr_jax.gguf_file import GGUFFile, GGUFTensor, open_gguf
from apr_jax.model.families import FAMILIES, by_gguf
from apr_jax.model.params import Params
from apr_jax.model.rope import Frequencies
from apr_jax.model.weights.errors import HuggingFaceError
from apr_jax.model.weights.hf import load_params
from apr_jax.model.weights.hf_config import read_config
from apr_jax.model.weights.tensors import Tensor

ROPE_DIVISORS = "rope_freqs.weight"
TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# config.json's keys, and those of a GGUF's metadata after "ARCHITECTURE."
CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_SAME = 1e-4  # how far a divisor may lie from the one of the RopeScaling that stands for it, relatively
_ORIGINAL = 8_192  # context of Llama 3's pretraining, for a file that names none


def load_gguf(
    path: pathlib.Path,
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "cpu", "xla", "splash", "cudnn"] = "auto",
    remat: Literal["auto", "none", "dots", "full"] = "none",
) -> tuple[ModelConfig, Params]:
    """Load the model of a GGUF file; the keywords are those of `load_hf`.

    Weights become float32, whatever their quantisation.

    Raises:
        FileError, ConfigError, FileNotFoundError: as of `open_gguf`.
        HuggingFaceError: the file holds another model than this project can run, or not all of it.
    """
    file = open_gguf(path)
    try:
        config = read_gguf_config(file, compute_dtype=compute_dtype, attention=attention, remat=remat)
    except (HuggingFaceError, ConfigError, TypeError, ValueError) as error:
        raise HuggingFaceError(f"{file.path}: {str(error).removeprefix('config.json: ')}") from error
    return config, load_params(file.path, _tensors(file, config), config, "its metadata")


def read_gguf_config(file: GGUFFile, **settings: Any) -> ModelConfig:
    """Read a model's configuration from a GGUF's metadata. Raises HuggingFaceError as `read_config`."""
    architecture = file.metadata.get("general.architecture")
    family = by_gguf(architecture)
    if family is None:
        known = ", ".join(sorted({facts.gguf for facts in FAMILIES.values()}))
        raise HuggingFaceError(f"general.architecture={architecture!r} is not supported; those here are {known}")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    values = {theirs: _one(own[ours], ours) for theirs, ours in CONFIG_KEYS.items() if ours in own}
    values |= {"model_type": FAMILIES[family].model_type, "tie_word_embeddings": "output.weight" not in file.tensors}
    if "rms_norm_eps" in values:  # "1e-05" in float32
        values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        values["vocab_size"] = embedding.shape[0]
    heads = values.get("num_attention_heads")
    if "head_dim" not in values and heads and type(heads) is int and values.get("hidden_size"):
        values["head_dim"] = values["hidden_size"] // heads
    _check_plain(own, values.get("head_dim"))
    if own.get("rope.scaling.type", "none") != "none":
        values["rope_parameters"] = {"rope_type": own["rope.scaling.type"]}
    if own.get("attention.sliding_window"):
        values |= {"sliding_window": own["attention.sliding_window"], "use_sliding_window": True}
    config = read_config(values, **settings)
    if ROPE_DIVISORS in file.tensors:
        original = own.get(ORIGINAL_CONTEXT, _ORIGINAL)
        stretched = _read_divisors(file.tensors[ROPE_DIVISORS], config, original)
        config = ModelConfig(**{**vars(config), "rope_scaling": stretched})
    return config


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Bring each head's rows from Hugging Face's order, pairs half a head apart, to llama.cpp's, side by side."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _separate(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo `interleave`."""
    return weight.reshape(num_heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _tensors(file: GGUFFile, config: ModelConfig) -> dict[str, Tensor]:
    """Return the file's tensors by Hugging Face's names, in Hugging Face's order of rows; an unknown name stays."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    found = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_DIVISORS:
            continue
        match = _NAME.fullmatch(name)
        layer, stem, kind = match.groups() if match else (None, "", "")
        known = (TOP_LEVEL if layer is None else PER_LAYER).get(stem)
        prefix = "" if layer is None else f"model.layers.{layer}."
        split = heads.get(stem) if FAMILIES[config.family].gguf_pairs else None
        is_integer = re.fullmatch(r"I\d+", tensor.type) is not None
        found[name if known is None else f"{prefix}{known}.{kind}"] = Tensor(
            tensor.shape, tensor.type if is_integer else "F32", _reader(file.path, name, tensor, split)
        )
    return found


def _reader(path: pathlib.Path, name: str, tensor: GGUFTensor, num_heads: int | None) -> Callable[[], Any]:
    def read() -> Any:
        try:
            array = tensor.read()
        except ValueError as error:
            raise HuggingFaceError(f"{path}: tensor {name}: {error}") from error
        return jnp.asarray(array if num_heads is None else _separate(array, num_heads))

    return read


def _one(value: Any, key: str) -> Any:
    """Return a number that may be stated for each layer. Raise HuggingFaceError where layers differ."""
    if not isinstance(value, np.ndarray):
        return value
    if len(set(value.tolist())) != 1:
        raise HuggingFaceError(f"{key} differs between layers, which is not supported")
    return value.tolist()[0]


def _check_plain(own: Mapping[str, Any], head_dim: Any) -> None:
    """Refuse what `llama.py` does not compute."""
    for key, plain in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)):
        if own.get(key, plain) != plain:
            raise HuggingFaceError(f"{key}={own[key]} is not supported, only {plain}")
    for key in ("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "rope.scaling.attn_factor"):
        if own.get(key, 0.0) not in (0.0, 1.0):
            raise HuggingFaceError(f"{key}={own[key]} is not supported")


def _read_divisors(tensor: GGUFTensor, config: ModelConfig, original: int) -> RopeScaling | None:
    """Return the RopeScaling that divides RoPE's frequencies by these divisors; None where all are 1.

    Raises:
        HuggingFaceError: they are no Llama 3's.
    """
    plain = np.asarray(Frequencies(config.head_dim, config.rope_theta).radians(), np.float64)
    divisors = tensor.read().astype(np.float64)
    if divisors.shape == plain.shape and (divisors == 1).all():
        return None
    if divisors.shape == plain.shape and np.isfinite(divisors).all() and (factor := float(divisors.max())) > 1:
        shares = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        for low, high in _bounds(original * plain / (2 * np.pi), shares):
            if not 0 < low < high < np.inf:
                continue
            scaling = RopeScaling(
                factor=factor,
                low_frequency_factor=float(f"{low:.5g}"),
                high_frequency_factor=float(f"{high:.5g}"),
                original_max_seq_len=original,
            )
            ours = Frequencies(config.head_dim, config.rope_theta, scaling).radians()
            if np.allclose(plain / np.asarray(ours, np.float64), divisors, rtol=_SAME):
                return scaling
    raise HuggingFaceError(f"{ROPE_DIVISORS} holds other divisors than Llama 3's RoPE, which alone is supported")


def _bounds(turns: np.ndarray, shares: np.ndarray) -> Iterator[tuple[float, float]]:
    """Yield what the low and high frequency factors may be, the likeliest first.

    Llama 3 keeps frequencies of many turns in the original context (share 1), divides those of few (share 0), and
    between the two bounds their share is a line in the turns.
    """
    yield 1.0, 4.0  # Llama 3.1's
    between = (shares > _SAME) & (shares < 1 - _SAME)
    if between.sum() >= 2:
        slope, offset = np.polyfit(turns[between], shares[between], 1)
        yield -offset / slope, (1 - offset) / slope
        return
    low, high = turns[shares <= _SAME].max(initial=0.0), turns[shares >= 1 - _SAME].min(initial=np.inf)
    for turn, share in zip(turns[between], shares[between], strict=True):  # the line goes through the one between
        yield low, low + (turn - low) / share
        yield (turn - share * high) / (1 - share), high
    yield low, high
