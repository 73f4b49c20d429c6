"""Hugging Face transformers: `generate`, greedy, batched, with a KV cache.

Two modes are measured, and the faster one at each lane count is reported:
    dynamic   the default: a cache that grows, eager execution, sdpa attention
    static    a cache of fixed length, the decoding step through torch.compile (inductor)
Inductor's freezing, which would pack the weights, is left out: it takes the static cache's length for a constant, and
the compiled step then writes out of bounds.
"""

import time
from collections.abc import Callable
from typing import Any

import protocol
import torch
import transformers

METHOD = "a stopping criterion notes the time after every token; decode runs from the first token's to the last one's"


class Clock(transformers.StoppingCriteria):
    """A stopping criterion that records the time of each token and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def modes(workload: protocol.Workload) -> dict[str, Callable[[], protocol.Decode]]:
    torch.set_num_threads(workload.threads)
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        workload.model, dtype=getattr(torch, workload.precision), attn_implementation="sdpa", local_files_only=True
    ).eval()
    model = model.to("cuda" if workload.device == "gpu" else "cpu")

    def dynamic() -> protocol.Decode:
        return _decode(model, workload.new_tokens)

    def static() -> protocol.Decode:
        return _decode(model, workload.new_tokens, cache_implementation="static", compile_config=_compiled())

    return {"dynamic": dynamic, "static": static}


def _compiled() -> transformers.CompileConfig:
    config = transformers.CompileConfig(dynamic=False, mode="default")
    config._compile_all_devices = True  # transformers compiles of its own accord on accelerators only
    return config


def _decode(model: Any, new_tokens: int, **settings: Any) -> protocol.Decode:
    config = transformers.GenerationConfig(
        do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0, **settings
    )

    def decode(prompts: list[list[int]]) -> protocol.Pass:
        longest = max(len(prompt) for prompt in prompts)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        clock = Clock()
        started = time.perf_counter()
        written = model.generate(
            tokens,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return protocol.Pass(
            prefill_seconds=clock.times[0] - started,
            decode_seconds=clock.times[-1] - clock.times[0],
            steps=len(clock.times) - 1,
            tokens=written[:, longest:].tolist(),
        )

    return decode


if __name__ == "__main__":
    protocol.main("hf", f"transformers {transformers.__version__}, torch {torch.__version__}", METHOD, modes)
