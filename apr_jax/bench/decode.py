"""Decode speed of a model on the devices of a mesh, by lane count: steady state, warm, with random weights.

Speed depends on shapes only, so random weights measure what trained ones would give.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.bench.datasheets import peaks_of
from apr_jax.bench.roofline import Limits, StepCost, measure_limits
from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import Config, ConfigError, EngineConfig, ModelConfig, RolloutConfig
from apr_jax.engine.engine import Engine
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.threads import Decode, Open, Program, Progress, RolloutKey
from apr_jax.kernels import for_decoding
from apr_jax.kernels.pairs import KernelPagedAttention
from apr_jax.model.params import Params, num_params
from apr_jax.parallel.device_memory import local_bytes
from apr_jax.parallel.machine import device_name
from apr_jax.parallel.mesh import make_mesh

CONTEXTS = (400, 2_048)  # tokens that a lane holds on average while an accelerator is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """The work that a platform's measurement takes."""

    lanes: tuple[int, ...]  # where none are asked for
    peer_lanes: tuple[int, ...]  # that peers are measured at, likewise
    new: int  # tokens that a lane decodes, likewise
    steps_per_visit: int
    uncounted: int  # passes before those that count
    passes: int  # that count at least; the fastest one is reported
    seconds: float  # of decoding that they take at least

    @classmethod
    def on(cls, mesh: Mesh, config: Config) -> Self:
        """Choose for a mesh. A CPU's first pass touches all memory, and others may be at work on its cores."""
        if mesh.devices.flat[0].platform == "cpu":
            return cls(
                lanes=(1, 8, 16, 64, 128),
                peer_lanes=(1, 16, 64),
                new=96,
                steps_per_visit=32,  # no lane stops early here, so visits need not be short
                uncounted=1,
                passes=3,
                seconds=0.0,
            )
        lanes = tuple(count * mesh.shape["data"] for count in (64, 128, 256, 512, 1_024))
        return cls(
            lanes=lanes,
            peer_lanes=(lanes[0], lanes[2]),
            new=640,
            steps_per_visit=config.engine.steps_per_visit,
            uncounted=0,
            passes=1,
            seconds=2.0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Every lane begins with a prompt and decodes new tokens after it; `prompt` and `new` are tokens."""

    prompt: int
    new: int

    @classmethod
    def around(cls, context: int, model: ModelConfig, effort: Effort) -> Self:
        """Choose lengths such that a lane holds `context` tokens on average while it is measured.

        As many tokens are new as the effort says, or as fit. Raises ConfigError where that is too few to measure.
        """
        visit = effort.steps_per_visit
        new = min(effort.new, 2 * (context - 2) - visit, 2 * (model.max_seq_len - context) + visit) // 2 * 2
        if new < 2 * visit:
            raise ConfigError(
                f"no {2 * visit} tokens can be decoded around a context of {context} within "
                f"model.max_seq_len={model.max_seq_len}"
            )
        return cls(prompt=context - (visit + new) // 2, new=new)

    def check(self, model: ModelConfig, effort: Effort) -> None:
        """Raise ConfigError where a thread would not fit, or where no visit would be left to measure."""
        if self.prompt + self.new > model.max_seq_len:
            raise ConfigError(
                f"{self.prompt} prompt and {self.new} new tokens exceed model.max_seq_len={model.max_seq_len}"
            )
        if self.new < 2 * effort.steps_per_visit:
            raise ConfigError(
                f"{self.new} new tokens leave nothing to measure after the first visit of {effort.steps_per_visit}: "
                "decode at least twice as many"
            )


def benchmark_decode(
    config: Config,
    params: Any,
    lanes: Sequence[int],
    lengths: Lengths,
    effort: Effort | None = None,
    on_lanes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure each lane count with an engine of its own, and the machine's limits before each and at the end.

    With one pass that counts (`effort.passes`) the limits are measured at the beginning and the end alone.

    A row holds `tokens_per_second`, `tokens_per_second_per_device`, `ms_per_step`, `host_share`, `context` (positions a
    lane held on average), `first_visit_seconds` (the prefill is in it) and `roofline_share`: the least time of a step
    under the limits over the time that it took. Where the devices are in the table of datasheets, `datasheet_share` is
    the same under its limits. Lane counts that the mesh's data shards don't divide are measured on one data shard, as
    `data_shards` says.
    """
    mesh = make_mesh(config.mesh)
    effort = effort or Effort.on(mesh, config)
    lengths.check(config.model, effort)
    limits = measure_limits(mesh, config.model.compute_dtype)
    sheet = datasheet(mesh)
    rows, compile_seconds, recompiles = {}, 0.0, 0
    for count in lanes:
        if on_lanes is not None:
            on_lanes(count)
        used = mesh_for(mesh, count)
        sizes, rollout = _sizes(config, count, lengths, effort, used), _rollout(config, lengths)
        engine = Engine(config.model, sizes, rollout, used, params=params, banned_tokens=())
        compile_seconds += engine.warm_up()
        rows[count] = _measure(engine, config, count, lengths, effort) | _shards(used)
        recompiles += engine.stats.compilations
        del engine
        if effort.passes > 1 or count == lanes[-1]:
            limits = limits.better(measure_limits(mesh, config.model.compute_dtype))
    return {
        **about(config, mesh),
        "kernel": kernel_name(config, mesh),
        "lengths": dataclasses.asdict(lengths),
        "limits": dataclasses.asdict(limits),
        "datasheet": sheet and dataclasses.asdict(sheet),
        "lanes": {str(count): row | _shares(config, count, row, limits, sheet, mesh) for count, row in rows.items()},
        "compile_seconds": compile_seconds,
        "recompiles_after_warmup": recompiles,
    }


def lengths_to_measure(
    model: ModelConfig, mesh: Mesh, effort: Effort, contexts: Sequence[int] | None, prompt: int | None
) -> list[Lengths]:
    """Return the lengths that are asked for, or else a platform's own: CONTEXTS on accelerators, those that fit.

    Raises ConfigError for a context that is asked for and cannot be measured.
    """
    if prompt is not None or (contexts is None and mesh.devices.flat[0].platform == "cpu"):
        return [Lengths(prompt=prompt or 64, new=effort.new)]
    if contexts is not None:
        return [Lengths.around(context, model, effort) for context in contexts]
    fitting = [context for context in CONTEXTS if context + effort.steps_per_visit <= model.max_seq_len]
    return [Lengths.around(context, model, effort) for context in fitting or [model.max_seq_len // 2]]


def lanes_to_measure(
    config: Config,
    params: Any,
    mesh: Mesh,
    lanes: Sequence[int] | None,
    lengths: Lengths,
    effort: Effort,
    say: Callable[[str], None],
) -> Sequence[int]:
    """Return the lane counts that are asked for, or else the platform's own that fit beside the weights given.

    `say` is told of the others. Raises ConfigError where a count does not fit that is asked for, or none does.
    """
    lengths.check(config.model, effort)
    beside = local_bytes([leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)])
    fitting: list[int] = []
    for count in effort.lanes if lanes is None else lanes:
        used = mesh_for(mesh, count)
        try:
            EnginePlan.of(config.model, _sizes(config, count, lengths, effort, used), used, beside=beside)
        except ConfigError as error:
            if lanes is not None or not fitting:
                raise
            say(f"leaving out {count} lanes of {lengths.prompt + lengths.new} tokens: {error}")
            continue
        fitting.append(count)
    return fitting


def mesh_for(mesh: Mesh, lanes: int) -> Mesh:
    """Return the mesh, or one data shard of it where its shards don't divide the lanes."""
    return mesh if lanes % mesh.shape["data"] == 0 else Mesh(mesh.devices[:1], mesh.axis_names, mesh.axis_types)


def about(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Describe the devices and the model, for a report."""
    return {
        "device": device_name(),
        "mesh": dict(mesh.shape),
        "model": {**dataclasses.asdict(config.model), "num_params": num_params(config.model).total},
    }


def kernel_name(config: Config, mesh: Mesh) -> str:
    """Return the name of the decode attention within the package, such as "kernels.cpu.attention.CpuPagedAttention"."""
    attention = for_decoding(config.model, config.engine, mesh).attention
    what: Any = attention.kernel if isinstance(attention, KernelPagedAttention) else type(attention)
    return f"{what.__module__}.{what.__qualname__}".removeprefix("apr_jax.")


def datasheet(mesh: Mesh) -> Limits | None:
    """Return the datasheet's limits of all devices of a mesh together; None for devices that are not in the table."""
    peaks = peaks_of(mesh.devices.flat[0].device_kind)
    return None if peaks is None else Limits(mesh.size * peaks.memory_bandwidth, mesh.size * peaks.flops)


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


def _sizes(config: Config, lanes: int, lengths: Lengths, effort: Effort, mesh: Mesh) -> EngineConfig:
    each, page_size = lanes // mesh.shape["data"], config.engine.page_size
    pages = -(-(lengths.prompt + lengths.new) // page_size) * each
    longest = -(-config.model.max_seq_len // page_size)
    return dataclasses.replace(
        config.engine,
        lanes=each,
        pages=max(pages, longest) + 1,
        prefill_lanes=min(config.engine.prefill_lanes, each),
        steps_per_visit=effort.steps_per_visit,
        prefix_reuse=False,
    )


def _rollout(config: Config, lengths: Lengths) -> RolloutConfig:
    return dataclasses.replace(config.rollout, max_steps=lengths.new)


def _measure(engine: Engine, config: Config, lanes: int, lengths: Lengths, effort: Effort) -> dict[str, float]:
    prompts = make_prompts(config, lanes, lengths)
    for _ in range(effort.uncounted):
        _pass(engine, config, prompts, lengths)
    passes: list[dict[str, float]] = []
    while len(passes) < effort.passes or sum(each["seconds"] for each in passes) < effort.seconds:
        passes.append(_pass(engine, config, prompts, lengths))
    return max(passes, key=lambda row: row["tokens_per_second"])


def _pass(engine: Engine, config: Config, prompts: Sequence[list[int]], lengths: Lengths) -> dict[str, float]:
    times: list[tuple[int, float]] = []

    def note(progress: Progress) -> None:
        times.append((progress.generated_tokens, time.perf_counter()))

    programs = [(RolloutKey(lane, 0), _decode(prompt, lengths.new)) for lane, prompt in enumerate(prompts)]
    begin = time.perf_counter()
    engine.run(programs, seed=config.seed, temperature=1.0, on_progress=note)
    # The first visit of each half holds the prefill; from its end on the lanes only decode.
    (before, start), (tokens, end) = times[engine.limits.halves - 1], times[-1]
    lanes, seconds = len(prompts), end - start
    return {
        "tokens_per_second": (tokens - before) / seconds,
        "ms_per_step": seconds / ((tokens - before) / lanes) * 1e3,
        "seconds": seconds,
        "host_share": engine.stats.host_share,
        "context": lengths.prompt + (before / lanes + lengths.new) / 2,
        "first_visit_seconds": start - begin,
    }


def _shards(mesh: Mesh) -> dict[str, int]:
    return {"data_shards": mesh.shape["data"], "devices": mesh.size}


def _shares(
    config: Config, lanes: int, row: dict[str, Any], limits: Limits, sheet: Limits | None, mesh: Mesh
) -> dict[str, float]:
    """Compare a row with the limits of the devices that it used. Devices of a CPU share all of it."""
    shards = row["data_shards"]
    cost = StepCost.of(config.model, lanes // shards, row["context"], config.engine.page_dtype)
    cost *= shards  # each reads weights of its own
    part = 1.0 if mesh.devices.flat[0].platform == "cpu" else row["devices"] / mesh.size
    least = {"roofline": limits, **({} if sheet is None else {"datasheet": sheet})}
    milliseconds = {name: cost.seconds(limit * part) * 1e3 for name, limit in least.items()}
    return {
        "tokens_per_second_per_device": row["tokens_per_second"] / row["devices"],
        "bytes_per_step": cost.bytes,
        "flops_per_step": cost.flops,
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        **{f"{name}_share": value / row["ms_per_step"] for name, value in milliseconds.items()},
    }


def _decode(prompt: list[int], new: int) -> Program:
    thread = yield Open(prompt)
    return (yield Decode(thread, (), max_tokens=new))


def table(result: dict[str, Any]) -> str:
    """Write the result for people."""
    lengths, sheet, devices = result["lengths"], result["datasheet"], int(np.prod(list(result["mesh"].values())))
    lines = [
        f"{result['device']}, {result['model']['num_params']:,} parameters in {result['model']['compute_dtype']}, "
        f"mesh {' x '.join(map(str, result['mesh'].values()))}, attention by {result['kernel']}",
        f"{lengths['new']} tokens after a prompt of {lengths['prompt']}; limits measured in this run: "
        f"{_rates(result['limits'])}" + (f"; by the datasheet: {_rates(sheet)}" if sheet else ""),
        "lanes    tokens/s"
        + ("   /device" if devices > 1 else "")
        + "    ms/step   roofline    share"
        + ("  datasheet    share" if sheet else ""),
    ]
    for lanes, row in result["lanes"].items():
        lines.append(
            f"{lanes:>5} {row['tokens_per_second']:>11,.1f}"
            + (f" {row['tokens_per_second_per_device']:>9,.0f}" if devices > 1 else "")
            + f" {row['ms_per_step']:>10.2f} {row['roofline_ms']:>10.2f} {row['roofline_share']:>8.0%}"
            + (f" {row['datasheet_ms']:>10.2f} {row['datasheet_share']:>8.0%}" if sheet else "")
        )
    lines.append(
        f"compiled in {result['compile_seconds']:.1f} s; {result['recompiles_after_warmup']} compilations after warm-up"
    )
    return "\n".join(lines)


def _rates(limits: dict[str, float]) -> str:
    return f"{limits['bytes_per_second'] / 1e9:,.1f} GB/s, {limits['flops_per_second'] / 1e9:,.0f} GFLOP/s"
