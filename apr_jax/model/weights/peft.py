"""Adapters as a folder that the package `peft` loads: adapter_config.json and adapter_model.safetensors.

Torch stores a matrix `[out, in]`: PEFT's A is `[rank, in]`, its B `[out, rank]`, and its product B A ours transposed.
"""

import pathlib

import numpy as np

from apr_jax.config import LoraConfig
from apr_jax.files import write_json
from apr_jax.model.lora import TARGETS, Adapters
from apr_jax.model.weights.hf import layer_name
from apr_jax.model.weights.tensors import save_tensors


def save_peft(folder: pathlib.Path, lora: LoraConfig, adapters: Adapters, base: str) -> None:
    """Write adapters of the policy `base`, a path or a name of Hugging Face's Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = [layer_name(f"blocks.0.{TARGETS[target]}").split(".")[-2] for target in lora.targets]
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": modules,
        },
    )
    tensors = {}
    for matrix, pair in adapters.items():
        module = "base_model.model." + layer_name(matrix).removesuffix(".weight")
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            tensors[f"{module}.{theirs}.weight"] = np.ascontiguousarray(np.asarray(pair[ours]).T)
    save_tensors(folder, tensors, "adapter_model.safetensors")
