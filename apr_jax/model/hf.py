"""Hugging Face folders in and out: config.json, safetensors (one file or sharded), generation_config.json, tokenizer.

Weights go through unchanged but for a transposition (torch stores `[out, in]`, our matmuls read `[in, out]`); the order
of RoPE's pairs is the same. Only what `llama.py` computes is accepted: anything else in config.json is refused by name.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from apr_jax.config import ModelConfig
from apr_jax.model.params import Params, abstract_params

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DEFAULT_ROPE_THETA = 10000.0  # what transformers assumes where config.json is silent
_DEFAULT_RMS_NORM_EPS = 1e-6

_REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
_TOP_LEVEL = {
    "embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}
_PER_LAYER = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
}


class HuggingFaceError(ValueError):
    """A folder that is not a Llama which this project can run. The message names what is missing or unsupported."""


class SavableTokenizer(Protocol):
    """What `save_hf` needs of a tokenizer."""

    bos_id: int
    eos_id: int
    pad_id: int

    def save(self, folder: str | pathlib.Path) -> None: ...


def load_hf(
    folder: str | pathlib.Path,
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "cpu", "windows", "xla", "splash", "cudnn"] = "auto",
    remat: Literal["none", "dots", "full"] = "none",
) -> tuple[ModelConfig, Params]:
    """The model of a Hugging Face folder; the keywords are settings that Hugging Face has no word for.

    Weights become float32, whatever they are stored in.

    Raises:
        HuggingFaceError: a tensor is missing, unexpected or of the wrong shape, or config.json asks for another model.
        FileNotFoundError: no config.json or no safetensors.
    """
    folder = pathlib.Path(folder)
    values = json.loads((folder / "config.json").read_text())
    config = _model_config(values, compute_dtype=compute_dtype, attention=attention, remat=remat)
    return config, _load_params(folder, config)


def save_hf(
    folder: str | pathlib.Path, config: ModelConfig, params: Params, tokenizer: SavableTokenizer | None = None
) -> None:
    """Writes a folder that `load_hf` and `transformers` load: float32 weights and, when given, the tokenizer."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {} if tokenizer is None else _special_tokens(tokenizer)
    _write_json(folder / "config.json", _hf_config(config) | special)
    _write_json(folder / "generation_config.json", special)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, transposed = _hf_name(path)
        array = np.asarray(leaf)
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)


def _model_config(values: Mapping[str, Any], **settings: Any) -> ModelConfig:
    _check_supported(values)
    missing = [key for key in _REQUIRED if values.get(key) is None]
    if missing:
        raise HuggingFaceError(f"config.json: {missing[0]} is missing")
    num_heads = values["num_attention_heads"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        num_layers=values["num_hidden_layers"],
        embed_dim=values["hidden_size"],
        mlp_dim=values["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=_either(values.get("num_key_value_heads"), num_heads),
        head_dim=_either(values.get("head_dim"), values["hidden_size"] // num_heads),
        max_seq_len=values["max_position_embeddings"],
        rope_theta=float(_rope(values).get("rope_theta", _DEFAULT_ROPE_THETA)),
        rms_norm_eps=float(_either(values.get("rms_norm_eps"), _DEFAULT_RMS_NORM_EPS)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        **settings,
    )


def _check_supported(values: Mapping[str, Any]) -> None:
    for key, supported in (
        ("model_type", "llama"),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
    ):
        if values.get(key, supported) != supported:
            raise HuggingFaceError(f"config.json: {key}={values[key]!r} is not supported, only {supported!r}")
    rope = _rope(values)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise HuggingFaceError(f"config.json: rope_type={rope_type!r} is not supported, only 'default'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise HuggingFaceError(f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not supported")


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings: `rope_parameters` of transformers 5, else `rope_theta` and `rope_scaling` of transformers 4."""
    own = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    return own | (values.get("rope_scaling") or {}) | (values.get("rope_parameters") or {})


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _special_tokens(tokenizer: SavableTokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _load_params(folder: pathlib.Path, config: ModelConfig) -> Params:
    files = _tensor_files(folder)
    abstract = abstract_params(config)
    known = {_hf_name(path)[0] for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    ignored = {_TOP_LEVEL["head"]} if config.tie_embeddings else set()
    unexpected = sorted(name for name in files.keys() - known - ignored if not name.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise HuggingFaceError(f"{folder}: tensor {unexpected[0]} has no place in this model ({len(unexpected)} such)")

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, transposed = _hf_name(path)
        if name not in files:
            raise HuggingFaceError(f"{folder}: tensor {name} is missing")
        array = files[name]()
        expected = leaf.shape[::-1] if transposed else leaf.shape
        if array.shape != expected:
            raise HuggingFaceError(f"{folder}: tensor {name} has shape {array.shape}, and config.json says {expected}")
        array = array.astype(jnp.float32)
        return array.T if transposed else array

    return jax.tree_util.tree_map_with_path(load, abstract)


def _tensor_files(folder: pathlib.Path) -> dict[str, Callable[[], jax.Array]]:
    """For each tensor of the folder, a function that reads it."""
    index = folder / _INDEX
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {_WEIGHTS}
    readers: dict[str, Callable[[], jax.Array]] = {}
    for name in sorted(names):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: no such file; a Hugging Face folder holds {_WEIGHTS} or {_INDEX}"
            )
        file: Any = safe_open(folder / name, framework="flax")
        readers |= {key: functools.partial(file.get_tensor, key) for key in list(file.keys())}
    return readers


def _hf_name(path: Any) -> tuple[str, bool]:
    """Hugging Face's name of a parameter, and whether it is stored transposed."""
    keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    ours = ".".join(keys)
    if keys[0] == "blocks":
        suffix = ".".join(keys[2:])
        return f"model.layers.{keys[1]}.{_PER_LAYER[suffix]}", not suffix.endswith("scale")
    return _TOP_LEVEL[ours], ours == "head"


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
