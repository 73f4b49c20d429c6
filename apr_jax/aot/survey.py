"""The survey behind `launch/compile_aot.py`: the best mesh of a topology, every program on it, and both as tables."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from apr_jax.aot.compilation import (
    Compiled,
    compile_program,
    engine_mesh,
    extrapolate,
    grpo_step_seconds,
    planned_programs,
)
from apr_jax.aot.mesh_search import Candidate, candidates, estimate, rows_per_shard
from apr_jax.aot.peaks import Estimate
from apr_jax.aot.topology import Topology
from apr_jax.bench.datasheets import Peaks
from apr_jax.config import Config, ConfigError, MeshConfig
from apr_jax.parallel.device_memory import memory_limit
from apr_jax.parallel.fit import fit
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.hosted_engine import plan_engine

_GB, _MS = 1e9, 1e3
RANKED_BY = "sft_step"  # the program that is compiled for every candidate


@dataclasses.dataclass(frozen=True)
class Survey:
    """A survey of a configuration's programs on an accelerator."""

    config: Config
    topology: Topology
    devices: Sequence[Any]
    num_candidates: int
    quick: bool  # programs from their compilations with one and with two layers, except those that then don't fit
    say: Callable[[str], None]
    on_text: Callable[[str, str], None] | None = None  # (name, optimised HLO)

    @property
    def peaks(self) -> Peaks:
        """Return the topology's peaks, with the memory that JAX gives to programs in place of all that a device has."""
        one = MeshConfig(data=1, fsdp=1, tensor=1)
        return dataclasses.replace(
            self.topology.peaks, memory=memory_limit(make_mesh(one, self.devices[:1])) or self.topology.peaks.memory
        )

    @property
    def devices_per_host(self) -> int:
        return sum(device.process_index == self.devices[0].process_index for device in self.devices)

    def run(self, mesh: MeshConfig | None = None) -> dict[str, Any]:
        """Return all figures, as plain JSON. With `mesh` no other is tried.

        Raises ConfigError when the mesh does not divide, and when no mesh fits the memory.
        """
        peaks = self.peaks
        if mesh is not None:
            ranked = [estimate(fit(self.config, mesh, self.devices_per_host), peaks)]
            rows: list[dict[str, Any]] = [_candidate_row(ranked[0], peaks, None)]
        else:
            ranked, rows = self._rank(peaks)
        config = ranked[0].config
        engine = plan_engine(config, make_mesh(config.mesh, self.devices))
        config = dataclasses.replace(config, engine=engine.sizes)
        programs = self._extrapolated(config, peaks) if self.quick else self._compile(config)
        hosts = len({device.process_index for device in self.devices})
        step = None
        if {"decode", "grpo_gradients", "grpo_update"} <= programs.keys():
            lanes = hosts * engine.limits.num_shards * engine.limits.lanes_in_turn
            step = grpo_step_seconds(config, programs, peaks, lanes)
        return {
            "topology": self.topology.name,
            "device": self.devices[0].device_kind,
            "devices": len(self.devices),
            "hosts": hosts,
            "peaks": dataclasses.asdict(peaks),
            "config": config.name,
            "num_layers": config.model.num_layers,
            "extrapolated": self.quick,
            "candidates": rows,
            "mesh": dataclasses.asdict(config.mesh),
            "engine_mesh": dataclasses.asdict(engine_mesh(config.mesh, self.devices_per_host)),
            "settings": settings(config),
            "programs": {name: program_row(program, peaks) for name, program in programs.items()},
            "refused": [name for name in planned_programs(config, self.devices) if name not in programs],
            "grpo_step_seconds": step,
        }

    def _rank(self, peaks: Peaks) -> tuple[list[Candidate], list[dict[str, Any]]]:
        """Rank candidates, best first by what compiling says of the promising ones. Returns a row for each, too."""
        every = candidates(self.config, len(self.devices), self.devices_per_host, peaks)
        if not every:
            raise ConfigError(
                f"no mesh of {len(self.devices)} devices divides this config; --mesh=DATA,FSDP,TENSOR says why not"
            )
        chosen, measured = every[: self.num_candidates], {}
        for candidate in chosen if len(chosen) > 1 else []:
            measured[candidate.mesh] = self._from_two_depths(candidate.config, [RANKED_BY]).get(RANKED_BY)

        def order(candidate: Candidate) -> tuple[bool, float]:
            program = measured.get(candidate.mesh)
            if program is None:
                return (len(chosen) > 1, candidate.estimate.seconds)
            return (program.memory > peaks.memory, Estimate.of(program.cost, peaks).seconds)

        ranked = sorted(chosen, key=order)
        rows = [_candidate_row(c, peaks, measured.get(c.mesh)) for c in [*ranked, *every[self.num_candidates :]]]
        return ranked, rows

    def _extrapolated(self, config: Config, peaks: Peaks) -> dict[str, Compiled]:
        """Return the programs from one and two layers, and compile those whole that don't seem to fit.

        One and two layers tell too much: their largest moment grows with each layer, that of many layers hardly does.
        """
        programs = self._from_two_depths(config)
        too_large = [name for name, program in programs.items() if program.memory > peaks.memory]
        return {**programs, **self._compile(config, too_large)} if too_large else programs

    def _from_two_depths(self, config: Config, only: Sequence[str] = ()) -> dict[str, Compiled]:
        """Return all programs, or `only` some, as one and two layers tell them."""
        one, two = (self._compile(config, only, depth) for depth in (1, 2))
        # The memory that a run holds beside a program is known without compiling.
        held = {name: planned.held for name, planned in planned_programs(config, self.devices).items()}
        grown = {name: extrapolate(one[name], two[name], config.model.num_layers) for name in one if name in two}
        return {name: dataclasses.replace(program, held=held[name]) for name, program in grown.items()}

    def _compile(self, config: Config, only: Sequence[str] = (), layers: int | None = None) -> dict[str, Compiled]:
        """Return the programs that the compiler takes, all or `only` some, with all layers or so many."""
        todo, compiled = planned_programs(config, self.devices, layers), {}
        for name in only or todo:
            label = f"{name} mesh {_mesh(config.mesh)}" + (f" {layers} layers" if layers else "")
            try:
                compiled[name] = compile_program(todo[name], self.on_text and _labelled(self.on_text, label))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                self.say(f"{label}: does not fit: {str(error).splitlines()[0][:200]}")
            else:
                self.say(f"{label}: compiled in {compiled[name].compile_seconds:.0f} s")
        return compiled


def settings(config: Config) -> dict[str, int]:
    """Return the settings that make this plan of the config, as overrides of `--config`."""
    mesh, sft, grpo = config.mesh, config.sft, config.grpo
    return {
        "mesh.data": mesh.data,
        "mesh.fsdp": mesh.fsdp,
        "mesh.tensor": mesh.tensor,
        "engine.lanes": config.engine.lanes,
        "engine.pages": config.engine.pages,
        "sft.microbatches": sft.microbatches,
        "grpo.rows_per_microbatch": grpo.rows_per_microbatch,
    }


def program_row(program: Compiled, peaks: Peaks) -> dict[str, Any]:
    """Describe one program as plain JSON, its roofline estimate included."""
    least = Estimate.of(program.cost, peaks)
    return {
        **dataclasses.asdict(program),
        "memory": program.memory,
        "limit": peaks.memory,
        "fits": program.memory <= peaks.memory,
        "estimate": {**dataclasses.asdict(least), "seconds": least.seconds, "bound": least.bound},
    }


def _candidate_row(candidate: Candidate, peaks: Peaks, compiled: Compiled | None) -> dict[str, Any]:
    row = {
        "mesh": dataclasses.asdict(candidate.mesh),
        "rows_per_device": rows_per_shard(candidate.config),
        "bytes_estimated": candidate.bytes_needed,
        "seconds_estimated": candidate.estimate.seconds,
    }
    if compiled is not None:
        least = Estimate.of(compiled.cost, peaks)
        row |= {"memory": compiled.memory, "fits": compiled.memory <= peaks.memory}
        row |= {"seconds": least.seconds, "bound": least.bound}
    return row


def _labelled(on_text: Callable[[str, str], None], label: str) -> Callable[[str], None]:
    return lambda text: on_text(label, text)


def _mesh(mesh: MeshConfig | dict[str, int]) -> str:
    values = mesh if isinstance(mesh, dict) else dataclasses.asdict(mesh)
    return " x ".join(str(values[axis]) for axis in ("data", "fsdp", "tensor"))


def tables(figures: dict[str, Any]) -> str:
    """Write the survey as Markdown."""
    return "\n\n".join([_about(figures), _candidates_table(figures["candidates"]), _programs_table(figures)])


def _about(figures: dict[str, Any]) -> str:
    peaks = figures["peaks"]
    lines = [
        f"{figures['config']} on {figures['topology']}: {figures['devices']} x {figures['device']}, "
        f"{figures['hosts']} host{'s' if figures['hosts'] > 1 else ''}; a device: {peaks['memory'] / _GB:.1f} GB, "
        f"{peaks['flops'] / 1e12:.0f} TFLOP/s, {peaks['memory_bandwidth'] / _GB:,.0f} GB/s, links "
        f"{peaks['link_bandwidth'] / _GB:.0f} GB/s ({peaks['source']})",
        f"mesh (data x fsdp x tensor) {_mesh(figures['mesh'])}, each host's engine {_mesh(figures['engine_mesh'])}",
        " ".join(f"--config.{name}={value}" for name, value in figures["settings"].items()),
    ]
    if figures["grpo_step_seconds"] is not None:
        lines.append(f"a GRPO step of full contexts takes at least {figures['grpo_step_seconds']:.1f} s")
    return "\n".join(lines)


def _candidates_table(rows: list[dict[str, Any]]) -> str:
    head = "| mesh | rows a device | GB estimated | s estimated | GB compiled | s compiled | bound |"
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        compiled = ["-"] * 3
        if "seconds" in row:
            compiled = [f"{row['memory'] / _GB:.1f}", f"{row['seconds']:.2f}", row["bound"]]
        known = [_mesh(row["mesh"]), str(row["rows_per_device"])]
        known += [f"{row['bytes_estimated'] / _GB:.1f}", f"{row['seconds_estimated']:.2f}"]
        lines.append(f"| {' | '.join([*known, *compiled])} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Write three digits: 7,260 and 0.00123."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.{max(0, digits)}f}" if value >= 1e-6 else "0"


def _programs_table(figures: dict[str, Any]) -> str:
    head = ["program", "GB", "arguments", "outputs", "temporaries", "held beside", "TFLOP", "GB moved", "GB sent"]
    head += ["collectives", "compute ms", "memory ms", "links ms", "bound"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in figures["programs"].items():
        cost, least = row["cost"], row["estimate"]
        whole = ", compiled whole" if figures["extrapolated"] and not row["extrapolated"] else ""
        cells = [f"`{name}`{whole}", f"{row['memory'] / _GB:.2f}{'' if row['fits'] else ' (does not fit)'}"]
        cells += [f"{row[part] / _GB:.2f}" for part in ("arguments", "outputs", "temporaries", "held")]
        cells += [_short(cost["flops"] / 1e12), _short(cost["bytes"] / _GB), _short(cost["sent"] / _GB)]
        cells += [
            ", ".join(f"{c['count']:,} {c['kind']} ({_short(c['payload'] / _GB)} GB)" for c in row["collectives"])
        ]
        cells += [_short(least[part] * _MS) for part in ("compute", "memory", "links")] + [least["bound"]]
        lines.append(f"| {' | '.join(cell or 'none' for cell in cells)} |")
    lines += [f"| `{name}` | the compiler refuses it: does not fit |" + " |" * 12 for name in figures["refused"]]
    return "\n".join(lines)
