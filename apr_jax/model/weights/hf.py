"""Hugging Face folders in and out: config.json, safetensors (one file or sharded), generation_config.json, tokenizer.

Weights go through unchanged but for a transposition: torch stores `[out, in]`, and our matmuls read `[in, out]`. The
order of RoPE's pairs is the same. Which models load is in `families.py`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.config import ConfigError, ModelConfig
from apr_jax.files import write_json
from apr_jax.model.params import Params, abstract_params
from apr_jax.model.weights.errors import HuggingFaceError
from apr_jax.model.weights.hf_config import TRAINED, read_config, write_config
from apr_jax.model.weights.tensors import Tensor, Tensors, open_tensors, read_own_json, save_tensors

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
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
}


class SavableTokenizer(Protocol):
    """The part of a tokenizer that `save_hf` needs."""

    bos_id: int
    eos_id: int
    pad_id: int

    def save(self, folder: str | pathlib.Path) -> None: ...


def load_hf(
    folder: str | pathlib.Path,
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "cpu", "windows", "xla", "splash", "cudnn"] = "auto",
    remat: Literal["auto", "none", "dots", "full"] = "none",
) -> tuple[ModelConfig, Params]:
    """Load the model of a Hugging Face folder; the keywords are settings that Hugging Face has no word for.

    Weights become float32, whatever floating-point type they are stored in.

    Raises:
        HuggingFaceError: a tensor is missing, unexpected or of the wrong shape, a file is damaged, or config.json asks
            for another model.
        FileNotFoundError: no config.json or no safetensors.
    """
    folder = pathlib.Path(folder)
    values = read_own_json(folder, "config.json")
    try:
        config = read_config(values, compute_dtype=compute_dtype, attention=attention, remat=remat)
    except (HuggingFaceError, ConfigError, TypeError, ValueError) as error:
        raise HuggingFaceError(f"{folder}: {error}") from error
    return config, load_params(folder, open_tensors(folder), config, "config.json")


def save_hf(
    folder: str | pathlib.Path,
    config: ModelConfig,
    params: Params,
    tokenizer: SavableTokenizer | None = None,
    trained: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write a folder that `load_hf` and `transformers` load: weights, rounded to `dtype`, and a tokenizer where given.

    Weights that the folder held before, sharded ones too, are replaced. `trained` is the whole configuration of the
    policy's training, which then travels with the weights (`checkpoints.identity`).
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {} if tokenizer is None else _special_tokens(tokenizer)
    write_json(folder / "config.json", write_config(config) | special | {"dtype": dtype})
    write_json(folder / "generation_config.json", special)
    (folder / TRAINED).unlink(missing_ok=True)  # of a policy that was here before
    if trained is not None:
        write_json(folder / TRAINED, trained)
    tensors = hf_tensors(params)
    save_tensors(folder, {name: array.astype(jnp.dtype(dtype), copy=False) for name, array in tensors.items()})
    if tokenizer is not None:
        tokenizer.save(folder)


def hf_tensors(params: Params) -> dict[str, np.ndarray]:
    """Return the weights by Hugging Face's names, each as Hugging Face stores it."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, transposed = _hf_name(path)
        array = np.asarray(leaf)
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    return tensors


def _special_tokens(tokenizer: SavableTokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def load_params(place: pathlib.Path, tensors: Tensors, config: ModelConfig, stated: str) -> Params:
    """Read the weights, after the files' headers have shown that they fit: no size is believed before.

    Args:
        place: the folder or file that holds them, for messages.
        tensors: by Hugging Face's names.
        stated: what states their shapes, for messages.
    Raises:
        HuggingFaceError: one is missing, unexpected, or of the wrong shape or type.
    """
    deepest = f"model.layers.{config.num_layers - 1}.input_layernorm.weight"
    if deepest not in tensors:
        raise HuggingFaceError(
            f"{place}: tensor {deepest} is missing; {stated} says num_hidden_layers={config.num_layers}"
        )
    abstract = abstract_params(config)
    head, tied = _TOP_LEVEL["head"], config.tie_embeddings
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name, transposed = _hf_name(path)
        expected[name] = leaf.shape[::-1] if transposed else leaf.shape
    if tied and head in tensors:
        expected[head] = expected[_TOP_LEVEL["embedding"]]
    unexpected = sorted(name for name in tensors.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise HuggingFaceError(f"{place}: tensor {unexpected[0]} has no place in this model ({len(unexpected)} such)")
    for name, shape in expected.items():
        _check_header(place, name, tensors.get(name), shape, stated)

    def read(name: str) -> jax.Array:
        array = tensors[name].read().astype(jnp.float32)
        if not jnp.isfinite(array).all():
            raise HuggingFaceError(f"{place}: tensor {name} holds NaN or infinity as float32; fetch the file again")
        return array

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, transposed = _hf_name(path)
        return read(name).T if transposed else read(name)

    params: Params = jax.tree_util.tree_map_with_path(load, abstract)
    if tied and head in tensors:
        embedding: Any = params["embedding"][...]
        if not jnp.array_equal(read(head), embedding):
            raise HuggingFaceError(
                f"{place}: {stated} says tie_word_embeddings=true, and {head} differs from "
                f"{_TOP_LEVEL['embedding']}; set tie_word_embeddings to false to use both"
            )
    return params


def _check_header(place: pathlib.Path, name: str, tensor: Tensor | None, shape: tuple[int, ...], stated: str) -> None:
    if tensor is None:
        raise HuggingFaceError(f"{place}: tensor {name} is missing; fetch the folder again")
    if tensor.shape != shape:
        raise HuggingFaceError(
            f"{place}: tensor {name} has shape {tensor.shape}, and {stated} says {shape}; fetch both again"
        )
    if not tensor.is_float:
        raise HuggingFaceError(
            f"{place}: tensor {name} holds {tensor.type_name}, not floating-point numbers; save the model in bfloat16"
        )


def _hf_name(path: Any) -> tuple[str, bool]:
    """Return Hugging Face's name of a parameter, and True if it is stored transposed."""
    keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    ours = ".".join(keys)
    if keys[0] == "blocks":
        return layer_name(ours), not ours.endswith(("scale", "bias"))
    return _TOP_LEVEL[ours], ours == "head"


def layer_name(ours: str) -> str:
    """Return Hugging Face's name of a layer's parameter, which ours is `blocks.N.*`."""
    _, layer, suffix = ours.split(".", 2)
    return f"model.layers.{layer}.{_PER_LAYER[suffix]}"
