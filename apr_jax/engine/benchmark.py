"""Decode speed of a model on this machine, by lane count: steady state, warm, with random weights.

Speed depends on shapes only, so random weights measure what trained ones would give.
"""

import dataclasses
import platform
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Config, RolloutConfig
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Decode, Open, Program, RolloutKey
from apr_jax.model.llama import init_params, num_params
from apr_jax.parallel.mesh import make_mesh

LANES = (1, 8, 16, 64, 128)


def benchmark_decode(config: Config, lanes: tuple[int, ...] = LANES) -> dict[str, Any]:
    """Measures each lane count with an engine of its own; the keys are those of INTERFACES
    (`launch/benchmark_decode.py`).

    Every lane decodes from a prompt of a quarter of the context to three quarters of it. Lane counts that the mesh's
    data shards don't divide are left out.
    """
    mesh = make_mesh(config.mesh)
    params = init_params(config.model, config.seed)
    results, compile_seconds, recompiles = {}, 0.0, 0
    for count in lanes:
        if count % config.mesh.data:
            continue
        engine = _engine(config, count, mesh, params)
        compile_seconds += engine.warm_up()
        results[str(count)] = _measure(engine, config, count)
        recompiles += engine.stats.compilations
    size = num_params(config.model)
    return {
        "device": f"{jax.devices()[0].device_kind} ({platform.processor() or platform.machine()})",
        "model": {**dataclasses.asdict(config.model), "num_params": size.total},
        "lanes": results,
        "compile_seconds": compile_seconds,
        "recompiles_after_warmup": recompiles,
    }


def _engine(config: Config, lanes: int, mesh: Mesh, params: Any) -> Engine:
    pages = -(-config.model.max_seq_len // config.rollout.page_size)
    rollout: RolloutConfig = dataclasses.replace(
        config.rollout,
        num_lanes=lanes,
        num_pages=pages * lanes + mesh.shape["data"],
        prefill_lanes=min(config.rollout.prefill_lanes, lanes),
        max_steps=config.model.max_seq_len // 2,
        prefix_reuse=False,
    )
    return Engine(config.model, rollout, mesh, params=params, banned_tokens=())


def _measure(engine: Engine, config: Config, lanes: int) -> dict[str, float]:
    rng = np.random.default_rng(config.seed)
    prompts = rng.integers(0, config.model.vocab_size, (lanes, config.model.max_seq_len // 4)).tolist()
    times: list[tuple[int, float]] = []

    def note(progress: Any) -> None:
        times.append((progress.generated_tokens, time.perf_counter()))

    for _ in range(2):  # the first run touches all memory
        times.clear()
        programs = [(RolloutKey(lane, 0), _decode(prompt)) for lane, prompt in enumerate(prompts)]
        engine.run(programs, seed=config.seed, temperature=1.0, on_progress=note)
    # The first visit holds the prefill; from its end on the lanes only decode.
    (tokens_before, start), (tokens, end) = times[0], times[-1]
    steps = (tokens - tokens_before) / lanes
    return {
        "tokens_per_second": (tokens - tokens_before) / (end - start),
        "ms_per_step": (end - start) / steps * 1e3,
        "host_share": engine.stats.host_share,
    }


def _decode(prompt: list[int]) -> Program:
    thread = yield Open(prompt)
    return (yield Decode(thread, ()))


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['device']}, {result['model']['num_params']:,} parameters", "lanes    tokens/s    ms/step"]
    for lanes, row in result["lanes"].items():
        lines.append(f"{lanes:>5} {row['tokens_per_second']:>11,.0f} {row['ms_per_step']:>10.2f}")
    lines.append(
        f"compiled in {result['compile_seconds']:.1f} s; {result['recompiles_after_warmup']} compilations after warm-up"
    )
    return "\n".join(lines)
