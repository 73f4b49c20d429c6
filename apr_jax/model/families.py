"""Families of Llama-like models, as data: what tells Llama, Qwen 2, Qwen 3 and Mistral apart.

All of them are the decoder of `llama.py`. A family adds biases or norms to queries and keys, and has a name and
defaults of its own in Hugging Face's config.json. SmolLM and SmolLM 2 are Llamas. Adding a family is one row of
`FAMILIES` (docs/extending.md).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """The facts of a family.

    Attributes:
        model_type: config.json's name of the family.
        architecture: transformers' class, which config.json names for other programs.
        biases: queries, keys and values have a bias (Qwen 2).
        head_norms: each head's queries and keys are normalised before RoPE (Qwen 3).
        silent: what transformers assumes where config.json lacks a key.
        written: keys of config.json that tell other programs about these facts.
        gguf: llama.cpp's name of the architecture.
        gguf_pairs: llama.cpp rotates neighbouring pairs, so that GGUF files hold rows of query and key in that order.
    """

    model_type: str
    architecture: str
    biases: bool = False
    head_norms: bool = False
    silent: Mapping[str, Any]
    written: Mapping[str, Any]
    gguf: str
    gguf_pairs: bool = False


_SILENT = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}

FAMILIES: dict[str, FamilyFacts] = {
    "llama": FamilyFacts(
        model_type="llama",
        architecture="LlamaForCausalLM",
        silent=_SILENT,
        written={"attention_bias": False, "mlp_bias": False},
        gguf="llama",
        gguf_pairs=True,
    ),
    "qwen2": FamilyFacts(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        biases=True,
        silent=_SILENT | {"num_key_value_heads": 32},
        written={"use_sliding_window": False},
        gguf="qwen2",
    ),
    "qwen3": FamilyFacts(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        head_norms=True,
        silent=_SILENT | {"num_key_value_heads": 32, "head_dim": 128},
        written={"attention_bias": False, "use_sliding_window": False},
        gguf="qwen3",
    ),
    "mistral": FamilyFacts(
        model_type="mistral",
        architecture="MistralForCausalLM",
        silent=_SILENT | {"num_key_value_heads": 8, "sliding_window": 4_096},
        written={"sliding_window": None},
        gguf="llama",
        gguf_pairs=True,
    ),
}


def by_model_type(model_type: Any) -> str | None:
    """Return the family that config.json's `model_type` names, or None."""
    return next((name for name, facts in FAMILIES.items() if facts.model_type == model_type), None)


def by_gguf(architecture: Any) -> str | None:
    """Return the first family that llama.cpp calls by this name, or None."""
    return next((name for name, facts in FAMILIES.items() if facts.gguf == architecture), None)
