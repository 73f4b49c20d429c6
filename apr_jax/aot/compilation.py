"""A run's device programs, compiled for accelerators that are not there: memory, work and least time of each.

Programs: the SFT step, GRPO's gradients of one microbatch and its update, the engine's prefill and decode. Trainer and
engine are built as a run builds them, on shapes instead of arrays. Each host of a slice has an engine of its own over
its own devices (`hosts.rollout_mesh`), so prefill and decode are compiled for one host.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.aot.flops import count_flops
from apr_jax.aot.hlo import Collective, Program
from apr_jax.aot.peaks import Cost, Estimate
from apr_jax.bench.datasheets import Peaks
from apr_jax.bench.roofline import StepCost
from apr_jax.config import Config, MeshConfig, ModelConfig
from apr_jax.data.packing import pack
from apr_jax.data.tokenizer import config_tokenizer
from apr_jax.engine.lanes import DecodeLanes, PrefillLanes
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.sharded import PAGES, SHARDED
from apr_jax.engine.steps import Sampling, Steps
from apr_jax.engine.threads import MAX_STOP_TOKENS
from apr_jax.model.params import num_params
from apr_jax.model.placement import abstract_params_on
from apr_jax.model.truncation import truncation_of
from apr_jax.parallel import hosts
from apr_jax.parallel.device_memory import local_bytes
from apr_jax.parallel.mesh import BATCH_AXES, make_mesh, partition_spec
from apr_jax.train.hosted_engine import plan_engine
from apr_jax.train.optimizer import make_optimizer, schedule
from apr_jax.train.recomputation import Recomputation
from apr_jax.train.rl.update import Updater, grpo_recomputation
from apr_jax.train.scorer import as_placed
from apr_jax.train.sft import make_sft_step, sft_recomputation
from apr_jax.train.state import abstract_state

_shape: Callable[..., Any] = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """A program before it is compiled."""

    jitted: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    flops: Callable[[Any], float]  # of one device, of the traced program
    held: int  # bytes that the run keeps on a device beside the program's arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The figures of a compiled program on one device. Sizes in bytes."""

    compile_seconds: float
    arguments: int
    outputs: int  # without those that take an argument's memory
    temporaries: int
    held: int
    cost: Cost
    collectives: tuple[Collective, ...]
    extrapolated: bool = False  # from one and two layers

    @property
    def memory(self) -> int:
        """All that is on the device while it runs."""
        return self.arguments + self.outputs + self.temporaries + self.held


def engine_mesh(mesh: MeshConfig, devices_per_host: int) -> MeshConfig:
    """Return the mesh of one host's engine: its weights over "tensor" as in training, its lanes over all else."""
    return MeshConfig(data=devices_per_host // mesh.tensor, fsdp=1, tensor=mesh.tensor)


def planned_programs(config: Config, devices: Sequence[Any], layers: int | None = None) -> dict[str, PlannedProgram]:
    """Return the run's programs on the config's mesh of `devices`, by name. Lowers and compiles nothing.

    With `layers` the model has so many, and backward passes recompute what they do in all of the config's.

    Raises ConfigError for a mesh that the model, the batches or the engine cannot have.
    """
    mesh = make_mesh(config.mesh, devices)
    rollout_mesh = hosts.rollout_mesh(mesh)  # of host 0
    recomputed = sft_recomputation(config.sft, config.model, mesh, config.lora), grpo_recomputation(config, mesh)
    if layers is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
    plan = plan_engine(config, mesh)
    engine = engine_programs(dataclasses.replace(config, engine=plan.sizes), rollout_mesh)
    engine_bytes = plan.memory.weights + plan.memory.pages
    return _training_programs(config, mesh, recomputed, engine_bytes, engine)


def _training_programs(
    config: Config,
    mesh: Mesh,
    recomputed: tuple[Recomputation, Recomputation],  # in SFT and in GRPO
    engine_bytes: int,
    engine: dict[str, PlannedProgram],
) -> dict[str, PlannedProgram]:
    model, sft = config.model, config.sft
    sft_optimizer = make_optimizer(sft.optimizer, sft.num_steps)
    rate = schedule(sft.optimizer, sft.num_steps, sft.optimizer.learning_rate)
    updater = Updater(config, mesh, config_tokenizer(config), recomputed[1])
    programs = updater.programs()
    gradients, update = programs["grpo_gradients"], programs["grpo_update"]
    state, params, _ = update[1]
    policy = abstract_params_on(mesh, model)
    base = (policy,) if config.lora.rank else ()
    reference = local_bytes(policy) if config.grpo.kl_coef > 0 or config.lora.rank else 0

    def shared(traced: Any) -> float:
        return count_flops(traced.jaxpr) / mesh.size

    trained = local_bytes(state) + reference
    given = local_bytes(params) + local_bytes(base)  # to gradients, and so no memory beside theirs
    return {
        "sft_step": PlannedProgram(
            make_sft_step(model, sft_optimizer, rate, mesh, config.lora, recomputed[0]),
            (abstract_state(mesh, model, sft_optimizer, config.lora), sft_batch(config, mesh), *base),
            mesh,
            shared,
            held=0,
        ),
        "grpo_gradients": PlannedProgram(*gradients, mesh, shared, held=trained - given + engine_bytes),
        "grpo_update": PlannedProgram(*update, mesh, shared, held=reference + engine_bytes),
        **{
            name: dataclasses.replace(program, held=trained + max(0, engine_bytes - local_bytes(program.arguments)))
            for name, program in engine.items()
        },
    }


def sft_batch(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the shapes of an SFT step's batch `[M, B / M, T]`, as the pipeline packs it."""
    sft = config.sft
    packed = pack([{"tokens": _INTS, "targets": _INTS, "weights": _FLOATS}], sft.row_len)
    row = as_placed(packed.rows, mesh)
    shape, spec = (sft.microbatches, sft.rows_per_step // sft.microbatches), partition_spec(None, BATCH_AXES)
    return {name: _on(_shape((*shape, *x.shape[1:]), x.dtype), mesh, spec) for name, x in row.items()}


def engine_programs(config: Config, mesh: Mesh) -> dict[str, PlannedProgram]:
    """Return prefill and decode as `Engine` runs them, without a gate."""
    model = config.model
    plan = EnginePlan.of(model, config.engine, mesh)
    limits, tensor = plan.limits, mesh.shape["tensor"]
    steps = Steps(limits, mesh, plan.weights, plan.kernels)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return _on(_shape(shape, dtype), mesh, SHARDED)

    weights = plan.weights
    params = jax.tree.map(
        lambda x, at: _shape(x.shape, x.dtype, sharding=at), weights.abstract(), weights.shardings(mesh)
    )
    pages = jax.tree.map(lambda x: _on(x, mesh, PAGES), jax.eval_shape(plan.pages))
    L, R = (limits.num_shards, limits.lanes_in_turn), steps.pages_per_row
    lanes = DecodeLanes(
        token=array(L),
        length=array(L),
        remaining=array(L),
        stop_tokens=array((*L, MAX_STOP_TOKENS)),
        key_data=array((*L, 2), jnp.uint32),
        generated=array(L),
        tables=array((*L, R)),
    )
    sampling = Sampling(
        _on(_shape((), jnp.float32), mesh),
        _on(_shape((model.vocab_size,), jnp.bool_), mesh),
        truncation=truncation_of(config.rollout),
    )
    L, width = (limits.num_shards, steps.prefill.num_lanes), steps.prefill.width
    prefill = PrefillLanes(array((*L, width)), array(L), array(L), array((*L, R)))
    flops = {
        "prefill": _prefill_flops(model, steps.prefill.num_lanes * width),
        "decode": StepCost.of(
            model, limits.lanes_in_turn, full_context(model, limits.lanes, limits.pages, limits.page_size)
        ).flops,
    }

    def planned(jitted: Any, arguments: tuple[Any, ...], flops: float) -> PlannedProgram:
        return PlannedProgram(jitted, arguments, mesh, lambda _: flops / tensor, held=0)

    programs = steps.programs(pages, params, lanes, sampling, prefill)
    return {name: planned(step.jitted, each, flops.get(name, 0.0)) for name, (step, each) in programs.items()}


def full_context(model: ModelConfig, lanes: int, pages: int, page_size: int) -> float:
    """Return the positions of a lane when all pages are in use, or its context is full."""
    return min(model.max_seq_len, (pages - 1) * page_size / lanes)


def _prefill_flops(model: ModelConfig, tokens: int) -> float:
    """Count FLOPs of one data shard: every weight but embedding and head, and attention to a full row."""
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * model.max_seq_len
    return tokens * (2 * num_params(model).non_embedding + attention)


def compile_program(planned: PlannedProgram, on_text: Callable[[str], None] | None = None) -> Compiled:
    """Trace, lower and compile. `on_text` gets the optimised program.

    Raises jax.errors.JaxRuntimeError where the compiler refuses, as a TPU's does when memory runs out.
    """
    start = time.perf_counter()
    traced = planned.jitted.trace(*planned.arguments)
    flops = planned.flops(traced)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if on_text is not None:
        on_text(text)
    program = Program(text)
    found = program.collectives(planned.mesh.size)
    return Compiled(
        compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        temporaries=memory.temp_size_in_bytes,
        held=planned.held,
        cost=Cost(flops=flops, bytes=program.bytes_moved(), sent=sum(c.sent for c in found)),
        collectives=tuple(found),
    )


def extrapolate(one: Compiled, two: Compiled, layers: int) -> Compiled:
    """Estimate a program of `layers` layers from those of one and of two, for layers are alike."""

    def grow(first: Any, second: Any) -> Any:
        if isinstance(first, tuple):
            return _grow_collectives(first, second, grow)
        if dataclasses.is_dataclass(first):
            fields = [field.name for field in dataclasses.fields(first)]
            values = {name: grow(getattr(first, name), getattr(second, name)) for name in fields}
            return dataclasses.replace(first, **values)  # type: ignore[type-var]
        return max(type(first)(0), first + (layers - 1) * (second - first))

    seconds = one.compile_seconds + two.compile_seconds
    return dataclasses.replace(grow(one, two), compile_seconds=seconds, extrapolated=True)


def _grow_collectives(
    first: tuple[Collective, ...], second: tuple[Collective, ...], grow: Callable[[Any, Any], Any]
) -> tuple[Collective, ...]:
    one, two = ({each.kind: each for each in found} for found in (first, second))
    none = [Collective(kind, 0, 0, 0.0) for kind in sorted({*one, *two})]
    grown = []
    for empty in none:
        a, b = one.get(empty.kind, empty), two.get(empty.kind, empty)
        grown.append(Collective(empty.kind, grow(a.count, b.count), grow(a.payload, b.payload), grow(a.sent, b.sent)))
    return tuple(grown)


def grpo_step_seconds(config: Config, programs: dict[str, Compiled], peaks: Peaks, lanes: int) -> float:
    """Return the least time of a GRPO step whose rollouts each generate a full context of `model.max_seq_len` tokens.

    The step decodes with every lane busy, and then computes gradients of full rows and an update, `inner_updates`
    times. Prefill and the reference's scores are left out.

    Args:
        programs: at least "decode", "grpo_gradients" and "grpo_update".
        lanes: that decode together in all engines.
    """
    grpo = config.grpo
    tokens = grpo.prompts_per_step * grpo.group_size * config.model.max_seq_len
    microbatches = -(-tokens // (grpo.rows_per_microbatch * grpo.row_len))
    least = {name: Estimate.of(program.cost, peaks).seconds for name, program in programs.items()}
    update = microbatches * least["grpo_gradients"] + least["grpo_update"]
    return tokens / lanes * least["decode"] + grpo.inner_updates * update


_INTS, _FLOATS = np.zeros(2, np.int32), np.zeros(2, np.float32)


def _on(x: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
    return _shape(x.shape, x.dtype, sharding=NamedSharding(mesh, partition_spec() if spec is None else spec))
