"""Small Hugging Face folders of every family, with weights that a seed makes, for `make_families.py` and the tests."""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# config.json of each case: the words of transformers 4 and of 5, tied heads and heads of their own.
CASES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama", "rope_theta": 5e5},
    "llama3": {**_SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "llama3_tied": {
        **_SIZES,
        "model_type": "llama",
        "rope_parameters": {**_LLAMA3, "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
    "smollm2": {**_SIZES, "model_type": "llama", "rope_theta": 1e5, "tie_word_embeddings": True, "head_dim": 8},
    "qwen2": {**_SIZES, "model_type": "qwen2", "rope_theta": 1e6, "head_dim": 8, "use_sliding_window": False},
    "qwen2_tied": {**_SIZES, "model_type": "qwen2", "rope_theta": 1e6, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3_tied": {**_SIZES, "model_type": "qwen3", "rope_theta": 1e6, "tie_word_embeddings": True},
    "mistral": {**_SIZES, "model_type": "mistral", "rope_theta": 1e6, "sliding_window": None},
}


def tensors_of(case: str) -> dict[str, np.ndarray]:
    """Return the weights of a case by Hugging Face's names, float32. Each is a function of its name alone."""
    values = CASES[case]
    width, mlp, head = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    queries, keys = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (values["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not values.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (values["vocab_size"], width)
    for layer in range(values["num_hidden_layers"]):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_proj.weight": (mlp, width),
            "mlp.up_proj.weight": (mlp, width),
            "mlp.down_proj.weight": (width, mlp),
        }
        if values["model_type"] == "qwen2":
            of_layer |= {
                f"self_attn.{name}_proj.bias": (size,) for name, size in zip("qkv", (queries, keys, keys), strict=True)
            }
        if values["model_type"] == "qwen3":
            of_layer |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def tokens() -> np.ndarray:
    """Return the token ids that every case reads, int64 `[2, 96]`: longer than Llama 3's original context."""
    return np.random.default_rng(7).integers(0, _SIZES["vocab_size"], (2, 96))


def write_folder(folder: pathlib.Path, case: str, *, shards: int = 1, dtype: Any = np.float32) -> pathlib.Path:
    """Write the case as a Hugging Face folder of one safetensors file, or of several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CASES[case]))
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(case).items()}
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if name.endswith("norm.weight"):
        return (1 + 0.3 * noise).astype(np.float32)
    return (0.3 * noise).astype(np.float32)
