"""Decode speed of a model on this machine, by lane count: steady state, warm, with random weights.

Speed depends on shapes only, so random weights measure what trained ones would give.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from apr_jax.bench.roofline import Limits, StepCost, measure_limits
from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import Config, ConfigError, MeshConfig
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Decode, Open, Program, Progress, RolloutKey
from apr_jax.model.params import Params, num_params
from apr_jax.parallel.fit import fit_to
from apr_jax.parallel.machine import device_name
from apr_jax.parallel.mesh import make_mesh

LANES = (1, 8, 16, 64, 128)
STEPS_PER_VISIT = 32  # no lane stops early here, so visits need not be short
REPEATS = 3  # passes of which the fastest counts, as for the peers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Every lane begins with a prompt and decodes new tokens after it; `prompt` and `new` are tokens."""

    prompt: int
    new: int

    def check(self, config: Config) -> None:
        """Raise ConfigError where a thread would not fit, or where no visit would be left to measure."""
        if self.prompt + self.new > config.model.max_seq_len:
            raise ConfigError(
                f"{self.prompt} prompt and {self.new} new tokens exceed model.max_seq_len={config.model.max_seq_len}"
            )
        if self.new < 2 * STEPS_PER_VISIT:
            raise ConfigError(
                f"{self.new} new tokens leave nothing to measure after the first visit of {STEPS_PER_VISIT}: decode at "
                "least twice as many"
            )


def benchmark_decode(
    config: Config,
    params: Any,
    lanes: Sequence[int] = LANES,
    lengths: Lengths | None = None,
    on_lanes: Callable[[int], None] | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Measure each lane count with an engine of its own, and the machine's limits before each and at the end.

    With one of `repeats`, the passes of which the fastest counts, the limits are measured at the beginning and the end.

    A row holds `tokens_per_second`, `ms_per_step`, `host_share`, `context` (positions a lane held on average),
    `first_visit_seconds` (the prefill is in it) and `roofline_share`: the least time of a step under the limits over
    the time that it took. Lane counts that the mesh's data shards don't divide are measured on one data shard, as
    `data_shards` says, and still compared with the limits of the whole mesh.
    """
    lengths = lengths or Lengths(prompt=config.model.max_seq_len // 4, new=config.model.max_seq_len // 2)
    lengths.check(config)
    mesh = make_mesh(config.mesh)
    config = fit_to(config, mesh)
    limits = measure_limits(mesh, config.model.compute_dtype)
    rows, compile_seconds, recompiles = {}, 0.0, 0
    for count in lanes:
        if on_lanes is not None:
            on_lanes(count)
        fitting = mesh_for(config, count)
        engine = _engine(config, count, lengths, make_mesh(fitting, tuple(mesh.devices.flat)), params)
        compile_seconds += engine.warm_up()
        rows[count] = _measure(engine, config, count, lengths, repeats) | {"data_shards": fitting.data}
        recompiles += engine.stats.compilations
        del engine
        if repeats > 1 or count == lanes[-1]:
            limits = limits.better(measure_limits(mesh, config.model.compute_dtype))
    return {
        **about(config),
        "lengths": dataclasses.asdict(lengths),
        "limits": dataclasses.asdict(limits),
        "lanes": {str(count): row | _share(config, count, row, limits) for count, row in rows.items()},
        "compile_seconds": compile_seconds,
        "recompiles_after_warmup": recompiles,
    }


def mesh_for(config: Config, lanes: int) -> MeshConfig:
    """Return the configuration's mesh, or the same with one data shard where its shards don't divide the lanes."""
    return config.mesh if lanes % config.mesh.data == 0 else dataclasses.replace(config.mesh, data=1)


def about(config: Config) -> dict[str, Any]:
    """Describe the device and the model, for a report."""
    return {
        "device": device_name(),
        "mesh": dataclasses.asdict(config.mesh),
        "model": {**dataclasses.asdict(config.model), "num_params": num_params(config.model).total},
    }


def policy_to_measure(path: pathlib.Path, config: Config, lengths: Lengths) -> tuple[Config, Params]:
    """Load a policy, and put its model into the configuration, with a context that is just long enough."""
    own, params, _ = load_policy(path)
    longest = min(own.max_seq_len, max(config.model.max_seq_len, lengths.prompt + lengths.new))
    model = dataclasses.replace(own, max_seq_len=longest, compute_dtype=config.model.compute_dtype)
    return dataclasses.replace(config, model=model), params


def make_prompts(config: Config, lanes: int, lengths: Lengths) -> list[list[int]]:
    """Draw random prompts; those of fewer lanes are the first of those of more."""
    rng = np.random.default_rng(config.seed)
    return rng.integers(0, config.model.vocab_size, (lanes, lengths.prompt)).tolist()


def _engine(config: Config, lanes: int, lengths: Lengths, mesh: Mesh, params: Any) -> Engine:
    each, page_size = lanes // mesh.shape["data"], config.engine.page_size
    pages = -(-(lengths.prompt + lengths.new) // page_size) * each
    longest = -(-config.model.max_seq_len // page_size)
    sizes = dataclasses.replace(
        config.engine,
        lanes=each,
        pages=max(pages, longest) + 1,
        prefill_lanes=min(config.engine.prefill_lanes, each),
        steps_per_visit=STEPS_PER_VISIT,
        prefix_reuse=False,
    )
    rollout = dataclasses.replace(config.rollout, max_steps=lengths.new)
    return Engine(config.model, sizes, rollout, mesh, params=params, banned_tokens=())


def _measure(engine: Engine, config: Config, lanes: int, lengths: Lengths, repeats: int) -> dict[str, float]:
    prompts = make_prompts(config, lanes, lengths)
    passes = []
    for _ in range(1 + repeats):  # the first touches all memory
        times: list[tuple[int, float]] = []

        def note(progress: Progress, times: list[tuple[int, float]] = times) -> None:
            times.append((progress.generated_tokens, time.perf_counter()))

        programs = [(RolloutKey(lane, 0), _decode(prompt, lengths.new)) for lane, prompt in enumerate(prompts)]
        begin = time.perf_counter()
        engine.run(programs, seed=config.seed, temperature=1.0, on_progress=note)
        # The first visit holds the prefill; from its end on the lanes only decode.
        (before, start), (tokens, end) = times[0], times[-1]
        steps = (tokens - before) / lanes
        passes.append(
            {
                "tokens_per_second": (tokens - before) / (end - start),
                "ms_per_step": (end - start) / steps * 1e3,
                "host_share": engine.stats.host_share,
                "context": lengths.prompt + (before / lanes + lengths.new) / 2,
                "first_visit_seconds": start - begin,
            }
        )
    return max(passes[1:], key=lambda row: row["tokens_per_second"])


def _share(config: Config, lanes: int, row: dict[str, float], limits: Limits) -> dict[str, float]:
    cost = StepCost.of(config.model, lanes, row["context"], config.engine.page_dtype)
    least = cost.seconds(limits) * 1e3
    return {
        "bytes_per_step": cost.bytes,
        "flops_per_step": cost.flops,
        "roofline_ms": least,
        "roofline_share": least / row["ms_per_step"],
    }


def _decode(prompt: list[int], new: int) -> Program:
    thread = yield Open(prompt)
    return (yield Decode(thread, (), max_tokens=new))


def table(result: dict[str, Any]) -> str:
    """Write the result for people."""
    limits, lengths = result["limits"], result["lengths"]
    lines = [
        f"{result['device']}, {result['model']['num_params']:,} parameters in {result['model']['compute_dtype']}, "
        f"mesh {' x '.join(map(str, result['mesh'].values()))}",
        f"{lengths['new']} tokens after a prompt of {lengths['prompt']}; limits measured in this run: "
        f"{limits['bytes_per_second'] / 1e9:.1f} GB/s, {limits['flops_per_second'] / 1e9:.0f} GFLOP/s",
        "lanes    tokens/s    ms/step   roofline    share",
    ]
    for lanes, row in result["lanes"].items():
        lines.append(
            f"{lanes:>5} {row['tokens_per_second']:>11,.1f} {row['ms_per_step']:>10.2f} {row['roofline_ms']:>10.2f} "
            f"{row['roofline_share']:>8.0%}"
        )
    lines.append(
        f"compiled in {result['compile_seconds']:.1f} s; {result['recompiles_after_warmup']} compilations after warm-up"
    )
    return "\n".join(lines)
