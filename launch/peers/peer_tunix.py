"""Google's Tunix (google-tunix): its JAX `Sampler` over its Llama, greedy, batched.

Prefill and the decoding loop are one compiled program each. The cache is as long as prompt and text, since every step
attends to all of it. Two things are corrected here, so that Tunix computes the same model as we do:
    RoPE's base   Tunix's attention ignores its config's rope_theta and uses 1,000,000; the config's is put in
    padding       the pad token is one that no prompt holds, because Tunix masks it anywhere in a prompt
XLA's CPU backend takes its thread count from the cores that the process may run on.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import protocol
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as model_lib
from tunix.models.llama3 import params as params_lib

METHOD = (
    "the sampler's prefill and decode programs are timed one by one; prefill gives each lane's first token, and decode "
    "runs as many steps as there are new tokens (the last one's is dropped, and counted here all the same)"
)
_PAD = -1
_NO_TOKEN = -2  # as the end of a sequence, so that every lane writes all its tokens


class Ids:
    """A tokenizer for Tunix's sampler, which takes texts: ours are token ids in decimal, with spaces between."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return _NO_TOKEN

    def pad_id(self) -> int:
        return _PAD


def modes(workload: protocol.Workload) -> dict[str, Callable[[], protocol.Decode]]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: workload.threads])
    return {"sampler": lambda: _decode(workload)}


def _decode(workload: protocol.Workload) -> protocol.Decode:
    config = _config(pathlib.Path(workload.model))
    model = params_lib.create_model_from_safe_tensors(workload.model, config, dtype=jnp.dtype(workload.precision))
    longest = max(len(prompt) for prompt in workload.prompts)
    cache = sampler_lib.CacheConfig(
        cache_size=longest + workload.new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = sampler_lib.Sampler(model, Ids(), cache)
    seconds: dict[str, float] = {}
    sampler._compiled_prefill_fn = _timed(sampler._compiled_prefill_fn, "prefill", seconds)
    sampler._compiled_decode_fn = _timed(sampler._compiled_decode_fn, "decode", seconds)

    def decode(prompts: list[list[int]]) -> protocol.Pass:
        output = sampler(
            [" ".join(map(str, prompt)) for prompt in prompts],
            max_generation_steps=workload.new_tokens,
            max_prompt_length=longest,
            temperature=0.0,
        )
        return protocol.Pass(
            prefill_seconds=seconds["prefill"],
            decode_seconds=seconds["decode"],
            steps=workload.new_tokens,
            tokens=[[int(token) for token in tokens] for tokens in output.tokens],
        )

    return decode


def _config(folder: pathlib.Path) -> model_lib.ModelConfig:
    values = json.loads((folder / "config.json").read_text())
    model_lib.apply_rope = functools.partial(model_lib.apply_rope, rope_theta=values["rope_theta"])
    return model_lib.ModelConfig(
        num_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        rope_theta=values["rope_theta"],
        norm_eps=values["rms_norm_eps"],
        weight_tying=values["tie_word_embeddings"],
    )


def _timed(program: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        result = program(*arguments, **settings)
        result.token_buffer.block_until_ready()
        seconds[name] = time.perf_counter() - started
        return result

    return call


if __name__ == "__main__":
    version = f"google-tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}"
    protocol.main("tunix", version, METHOD, modes)
