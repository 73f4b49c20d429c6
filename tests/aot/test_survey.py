"""Compiling ahead of time, on CPU devices in place of accelerators: the figures are those of the programs that run."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from apr_jax.aot.compilation import (
    Compiled,
    compile_program,
    engine_mesh,
    extrapolate,
    grpo_step_seconds,
    planned_programs,
)
from apr_jax.aot.hlo import Collective
from apr_jax.aot.peaks import Cost
from apr_jax.aot.survey import Survey, tables
from apr_jax.aot.topology import parse_topology
from apr_jax.bench.datasheets import Peaks
from apr_jax.config import MeshConfig
from apr_jax.engine.plan import EnginePlan
from apr_jax.parallel.device_memory import local_bytes
from apr_jax.parallel.fit import fit
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.state import TrainState
from tests.train.small import small_config

pytestmark = pytest.mark.heavy

PROGRAMS = {"sft_step", "grpo_gradients", "grpo_update", "prefill", "copy_pages", "decode"}
ROUND = Peaks(flops=1e3, memory=1000, memory_bandwidth=100.0, link_bandwidth=10.0, source="made up")


def made(flops=0.0, bytes=0.0, sent=0.0, collectives=(), **sizes):
    sizes = {"arguments": 0, "outputs": 0, "temporaries": 0, "held": 0} | sizes
    cost = Cost(flops=flops, bytes=bytes, sent=sent)
    return Compiled(compile_seconds=1.0, cost=cost, collectives=tuple(collectives), **sizes)


def test_a_host_has_an_engine_of_its_own():
    assert engine_mesh(MeshConfig(data=2, fsdp=4, tensor=2), 4) == MeshConfig(data=2, fsdp=1, tensor=2)
    assert engine_mesh(MeshConfig(data=1, fsdp=8, tensor=1), 8) == MeshConfig(data=8, fsdp=1, tensor=1)


def test_layers_are_extrapolated():
    one = made(flops=10.0, bytes=3.0, temporaries=100, collectives=[Collective("all-reduce", 2, 20, 30.0)])
    two = made(
        flops=14.0,
        bytes=3.0,
        temporaries=90,
        collectives=[Collective("all-gather", 1, 5, 4.0), Collective("all-reduce", 3, 25, 35.0)],
    )
    five = extrapolate(one, two, 5)
    assert (five.cost.flops, five.cost.bytes, five.temporaries) == (26.0, 3.0, 60)
    assert five.collectives == (Collective("all-gather", 4, 20, 16.0), Collective("all-reduce", 6, 40, 50.0))
    assert extrapolate(one, two, 2).cost == two.cost
    assert extrapolate(one, two, 50).temporaries == 0


def test_a_grpo_step_by_hand():
    config = small_config()
    programs = {
        "decode": made(bytes=200.0),  # 2 s
        "grpo_gradients": made(flops=3e3),  # 3 s
        "grpo_update": made(sent=5.0),  # 0.5 s
    }
    tokens = 2 * 2 * 128
    decode, microbatches = tokens / (8 * 2 * 3) * 2, tokens / (4 * 128)
    updates = config.grpo.inner_updates * (microbatches * 3 + 0.5)
    assert grpo_step_seconds(config, programs, ROUND, lanes=8 * 2 * 3) == pytest.approx(decode + updates)


def test_memory_is_all_that_is_on_the_device():
    assert made(arguments=1, outputs=20, temporaries=300, held=4000).memory == 4321


def test_programs_are_those_that_a_run_compiles():
    """What the engine's plan says is held, and what the batches hold, is what goes into the programs."""
    config = fit(small_config(), MeshConfig(data=2, fsdp=1, tensor=1), 2)
    found = planned_programs(config, jax.devices()[:2])
    assert found.keys() - {"prefill_write"} == PROGRAMS
    plain = dataclasses.replace(config, engine=dataclasses.replace(config.engine, decode_attention="xla"))
    assert planned_programs(plain, jax.devices()[:2]).keys() == {*PROGRAMS, "prefill_write"}
    plan = EnginePlan.of(config.model, config.engine, make_mesh(config.mesh))
    pages = local_bytes(found["decode"].arguments[0])
    assert pages == plan.memory.pages
    assert found["prefill"].held >= found["decode"].held
    _, batch = found["sft_step"].arguments
    assert batch["tokens"].shape == (config.sft.microbatches, 4 // config.sft.microbatches, 128)
    assert set(batch) == {"tokens", "targets", "positions", "segment_ids", "weights"}
    _, _, microbatch, _, _ = found["grpo_gradients"].arguments
    assert microbatch["rollout_logprob"].dtype == np.float32
    assert microbatch["tokens"].shape == (config.grpo.rows_per_microbatch, 128)


def test_a_compiled_step_holds_the_state_and_reduces_gradients():
    config = fit(small_config(), MeshConfig(data=2, fsdp=1, tensor=1), 2)
    planned = planned_programs(config, jax.devices()[:2])["sft_step"]
    texts = []
    compiled = compile_program(planned, texts.append)
    assert compiled.arguments >= local_bytes(planned.arguments[0])
    assert compiled.outputs < compiled.arguments / 2, "the state is donated"
    assert "all-reduce" in {found.kind for found in compiled.collectives}
    assert compiled.cost.sent > 0
    assert texts[0].startswith("HloModule")


@pytest.fixture
def compilers_stand_in(monkeypatch):
    """Programs of known cost in place of compiled ones: fsdp is slower, and its layers larger."""

    def compile_program(planned, on_text=None):
        fsdp = planned.mesh.shape["fsdp"]
        return made(flops=1e12 * fsdp, bytes=1e9, arguments=10**9, temporaries=10**9 * fsdp, held=planned.held)

    monkeypatch.setattr("apr_jax.aot.survey.compile_program", compile_program)


def survey(**changes):
    config = dataclasses.replace(small_config(), grpo=dataclasses.replace(small_config().grpo, kl_coef=0.1))
    values = {"num_candidates": 2, "quick": False, "say": lambda line: None} | changes
    return Survey(config, parse_topology("tpu:v5p:2x1x1"), jax.devices()[:2], **values)


def test_the_survey_ranks_and_says_it_all(compilers_stand_in):
    figures = survey().run()
    assert figures["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert [row["seconds"] for row in figures["candidates"] if "seconds" in row] == sorted(
        row["seconds"] for row in figures["candidates"] if "seconds" in row
    )
    row = figures["programs"]["decode"]
    assert row["memory"] == row["arguments"] + row["outputs"] + row["temporaries"] + row["held"]
    assert row["fits"]
    text = tables(figures)
    assert "--config.mesh.data=2" in text
    assert all(f"`{name}`" in text for name in PROGRAMS)


def test_a_forced_mesh_is_the_only_one(compilers_stand_in):
    figures = survey(quick=True).run(MeshConfig(data=1, fsdp=2, tensor=1))
    assert figures["extrapolated"]
    assert [row["mesh"]["fsdp"] for row in figures["candidates"]] == [2]


def test_what_two_layers_say_does_not_fit_is_compiled_whole(monkeypatch):
    """The largest moment of one and of two layers grows by a layer's size, and of more layers no longer."""
    said = []
    small = survey(quick=True, say=said.append)
    model = dataclasses.replace(small.config.model, num_layers=3)
    three = dataclasses.replace(small, config=dataclasses.replace(small.config, model=model))
    limit = three.peaks.memory

    def compile_program(planned, on_text=None):
        match planned.arguments:
            case TrainState() as state, {"weights": _}:
                layers = len(state.params["blocks"])
            case _:
                layers = 1
        return made(temporaries=[limit // 4, 3 * limit // 4, 3 * limit // 4][layers - 1])

    monkeypatch.setattr("apr_jax.aot.survey.compile_program", compile_program)
    figures = three.run(MeshConfig(data=2, fsdp=1, tensor=1))
    assert tables(figures).count("compiled whole") == 1
    assert "| `sft_step`, compiled whole |" in tables(figures)
    programs = figures["programs"]
    whole = programs.pop("sft_step")
    assert (whole["memory"], whole["fits"], whole["extrapolated"]) == (3 * limit // 4, True, False)
    assert all(row["extrapolated"] for row in programs.values())
    assert [line for line in said if "layers" not in line] == ["sft_step mesh 2 x 1 x 1: compiled in 1 s"]


def test_what_the_compiler_refuses_is_told(monkeypatch):
    def refuse(planned, on_text=None):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")

    monkeypatch.setattr("apr_jax.aot.survey.compile_program", refuse)
    said = []
    figures = survey(say=said.append).run(MeshConfig(data=2, fsdp=1, tensor=1))
    assert set(figures["refused"]) - {"prefill_write"} == PROGRAMS
    assert "does not fit" in said[0]
    assert "does not fit" in tables(figures)
    assert isinstance(figures["grpo_step_seconds"], types.NoneType)
