"""The engine's programs of the 228M model compile for TPUs and GPUs that are not there, call their kernels, fit the
memory, keep data shards apart and never copy the cache. `make test-aot`; skipped where the compilers are missing."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAYERS = 18
CACHE_BYTES = 2 * LAYERS * 1024 * 16 * 64 * 64 * 2  # keys and values of a shard's 1,024 pages of 64 positions, bfloat16
TARGETS = {  # compiler, decode kernel, memory, meshes (data, tensor)
    "tpu:v5e:2x2": ("libtpu", "tpu_custom_call", 16 * 2**30, [(1, 1), (2, 2)]),
    "tpu:v5p:2x2x1": ("libtpu", "tpu_custom_call", 95 * 2**30, [(1, 1), (2, 2)]),
    "gpu:h100:8": ("jax_plugins.xla_cuda12", "__gpu$xla.gpu.triton", 80 * 10**9, [(1, 1), (2, 2), (8, 1)]),
}
TRAINING_KERNELS = {  # of one layer, forward and backward
    "tpu_custom_call": (["tpu_custom_call"], 3),
    "__gpu$xla.gpu.triton": (["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"], 2),
}
pytestmark = pytest.mark.aot


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    """A target and what was compiled for it, in a process of its own: one process holds one accelerator's compiler."""
    compiler, kernel, memory, meshes = TARGETS[request.param]
    if not installed(compiler):
        pytest.skip(f"{compiler} is not installed: make test-aot")
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile", request.param],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    programs = json.loads(done.stdout)["programs"]
    return kernel, memory, [(data, tensor, pick(programs, data, tensor)) for data, tensor in meshes]


def pick(programs, data, tensor):
    suffix = f" data={data} tensor={tensor}"
    return {name.removesuffix(suffix): row for name, row in programs.items() if name.endswith(suffix)}


def test_decode_calls_its_kernel_in_every_layer(target):
    kernel, _, meshes = target
    for _, _, programs in meshes:
        assert programs["decode"]["kernels"] == [kernel]
        assert programs["decode"]["num_kernels"] == LAYERS


def test_a_tpu_prefills_without_branches_by_its_kernel(target):
    kernel, _, meshes = target
    if kernel == "tpu_custom_call":
        for _, _, programs in meshes:
            assert (programs["prefill"]["num_kernels"], programs["prefill"]["conditionals"]) == (LAYERS, 0)


def test_training_attention_calls_its_kernels(target):
    kernel, _, meshes = target
    for _, _, programs in meshes:
        row = programs["train_attention"]
        assert (row["kernels"], row["num_kernels"]) == TRAINING_KERNELS[kernel]


def test_nothing_is_communicated_over_data(target):
    *_, meshes = target
    for _, tensor, programs in meshes:
        for name, row in programs.items():
            assert row["collectives_over_data"] == 0, name
            assert bool(row["collectives"]) == (tensor > 1 and name in ("decode", "prefill")), name


def test_every_program_fits_the_device(target):
    _, memory, meshes = target
    for _, _, programs in meshes:
        for name, row in programs.items():
            assert row["argument_bytes"] + row["temp_bytes"] + row["output_bytes"] < memory, name


def test_pages_are_updated_in_place(target):
    *_, meshes = target
    for _, tensor, programs in meshes:
        writers = {"decode", "copy_pages", "prefill_write" if "prefill_write" in programs else "prefill"}
        for name in sorted(writers):
            row = programs[name]
            assert row["alias_bytes"] >= CACHE_BYTES // tensor, name
            assert row["page_copies"] == 0, name
            assert row["temp_bytes"] < CACHE_BYTES // tensor / LAYERS, f"{name}: less than one layer's pages"
        assert programs["prefill"]["page_copies"] == 0


def test_the_host_is_asked_for_no_branch(target):
    *_, meshes = target
    for _, _, programs in meshes:
        assert programs["decode"]["conditionals"] == 0
        assert programs["prefill"]["conditionals"] <= 8


@pytest.fixture
def survey(tmp_path):
    """The launcher: (topology, mesh, more flags) -> what it found, with its exit status 0 asserted."""

    def run(topology, mesh, *flags):
        compiler = "libtpu" if topology.startswith("tpu") else "jax_plugins.xla_cuda12"
        if not installed(compiler):
            pytest.skip(f"{compiler} is not installed: make test-aot")
        found = tmp_path / "found.json"
        command = [sys.executable, "launch/compile_aot.py", f"--topology={topology}", f"--mesh={mesh}"]
        done = subprocess.run(
            [*command, *flags, f"--json={found}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(found.read_text())

    return run


@pytest.mark.parametrize("topology", ["tpu:v5e:2x2", "gpu:h100:4"])
def test_a_whole_run_is_surveyed(topology, survey):
    """The launcher on a small model: every program compiles on a mesh of all three axes, and what was told is there."""
    small = ["model.num_layers=2", "model.embed_dim=256", "model.mlp_dim=512", "model.num_heads=4"]
    small += ["model.num_kv_heads=4", "model.vocab_size=1024", "sft.rows_per_step=16", "sft.microbatches=2"]
    found = survey(topology, "1,2,2", *(f"--config.{field}" for field in small))
    assert found["engine_mesh"] == {"data": 2, "fsdp": 1, "tensor": 2}
    for name, row in found["programs"].items():
        assert row["fits"], name
        assert row["estimate"]["seconds"] > 0, name
    assert {c["kind"] for c in found["programs"]["sft_step"]["collectives"]} & {"all-gather", "reduce-scatter"}
    assert found["programs"]["decode"]["collectives"], "heads are split over tensor"


@pytest.mark.parametrize(
    ("topology", "variant", "mesh"),
    [
        ("tpu:v5e:4x4", "paper", "4,4,1"),
        ("tpu:v5p:2x2x1", "paper", "4,1,1"),
        ("gpu:h100:1", "paper", "1,1,1"),
        ("gpu:h100:8", "paper", "8,1,1"),
        ("gpu:h100:8", "7b", "1,8,1"),
    ],
)
def test_a_configuration_as_it_stands_uses_all_devices_and_fits_their_memory(topology, variant, mesh, survey):
    """Trainer and engine together: what a program takes while it runs, and what the run holds beside it."""
    found = survey(topology, mesh, f"--config=configs/grpo.py:{variant}", "--quick")
    assert math.prod(found["mesh"].values()) == found["devices"]
    assert math.prod(found["engine_mesh"].values()) * found["hosts"] == found["devices"]
    assert not found["refused"]
    assert {"sft_step", "grpo_gradients", "grpo_update", "prefill", "decode"} <= found["programs"].keys()
    for name, row in found["programs"].items():
        assert row["fits"], name
        assert row["memory"] <= found["peaks"]["memory"], name
