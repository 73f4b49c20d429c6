"""A model to a GGUF file, by the writer of the package `gguf`. llama.cpp and `load_gguf` read it."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.config import ConfigError, ModelConfig
from apr_jax.files import naming
from apr_jax.gguf_file import package
from apr_jax.model.families import FAMILIES
from apr_jax.model.params import Params
from apr_jax.model.rope import Frequencies
from apr_jax.model.weights.gguf import CONFIG_KEYS, ORIGINAL_CONTEXT, PER_LAYER, ROPE_DIVISORS, TOP_LEVEL, interleave
from apr_jax.model.weights.hf import hf_tensors
from apr_jax.model.weights.hf_config import write_config

# Types that weights can be written in, and ggml's number for a file of each (llama.h: LLAMA_FTYPE).
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)")


def save_gguf(
    path: pathlib.Path,
    config: ModelConfig,
    params: Params,
    metadata: Mapping[str, Any],
    *,
    name: str,
    weight_type: str = "F32",
) -> None:
    """Write a GGUF file, whole or not at all.

    Args:
        metadata: more of it, such as the tokenizer's.
        name: of the model, for people.
        weight_type: of the matrices, in TYPES. Norms and biases stay float32, as do matrices whose rows the type's
            blocks do not divide.
    Raises:
        ConfigError: the package gguf is not installed.
    """
    gguf = package()
    facts = FAMILIES[config.family]
    temporary = path.with_name(path.name + ".incomplete")
    values = write_config(config)
    try:
        with naming(path):
            writer = gguf.GGUFWriter(temporary, facts.gguf)
            writer.add_name(name)
            writer.add_file_type(TYPES[weight_type])
            for theirs, ours in CONFIG_KEYS.items():
                _add(writer, f"{facts.gguf}.{ours}", values[theirs])
            for key in ("attention.value_length", "rope.dimension_count"):
                _add(writer, f"{facts.gguf}.{key}", config.head_dim)
            _add(writer, f"{facts.gguf}.vocab_size", config.vocab_size)
            if config.rope_scaling is not None:
                _add(writer, f"{facts.gguf}.{ORIGINAL_CONTEXT}", config.rope_scaling.original_max_seq_len)
            for key, value in metadata.items():
                _add(writer, key, value)
            for tensor, array in _tensors(config, params).items():
                kind = _type_for(gguf, array, weight_type)
                writer.add_tensor(tensor, gguf.quants.quantize(array, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_type(weight_type: str) -> None:
    """Raise ConfigError for a type that cannot be written."""
    if weight_type not in TYPES:
        raise ConfigError(f"--type={weight_type}: choose one of {', '.join(TYPES)}")


def _tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Return the weights by llama.cpp's names, in its order of rows, and the divisors of a stretched RoPE."""
    facts, heads = FAMILIES[config.family], {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    top = {theirs: ours for ours, theirs in TOP_LEVEL.items()}
    per_layer = {theirs: ours for ours, theirs in PER_LAYER.items()}
    tensors = {}
    for name, array in hf_tensors(params).items():
        match = _LAYER.fullmatch(name)
        if match is None:
            tensors[f"{top[name.removesuffix('.weight')]}.weight"] = array
            continue
        layer, stem, kind = match[1], per_layer[match[2]], match[3]
        if facts.gguf_pairs and stem in heads:
            array = interleave(array, heads[stem])
        tensors[f"blk.{layer}.{stem}.{kind}"] = np.ascontiguousarray(array)
    if config.rope_scaling is not None:
        plain = np.asarray(Frequencies(config.head_dim, config.rope_theta).radians(), np.float64)
        stretched = np.asarray(Frequencies.of(config).radians(), np.float64)
        tensors[ROPE_DIVISORS] = (plain / stretched).astype(np.float32)
    return tensors


def _type_for(gguf: Any, array: np.ndarray, weight_type: str) -> Any:
    kind = gguf.GGMLQuantizationType[weight_type]
    fits = array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else gguf.GGMLQuantizationType.F32


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value of metadata by its Python type: whole numbers as uint32, others as float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
