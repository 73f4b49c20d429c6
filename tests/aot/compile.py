"""Compiles the engine's programs of the 228M model for accelerators that are not there, and says what came out.

    .venv-aot/bin/python -m tests.aot.compile v5e:2x2 --table      # or v5p:2x2x1, or h100

One JSON object, or a Markdown table. `make test-aot` makes the environment that this needs (docs/accelerators.md).
"""

import argparse
import ctypes
import dataclasses
import json
import os
import pathlib
import re
import sysconfig
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Nothing can be tuned by trying on a GPU that is not there; cuBLAS takes what Triton's matmuls would.
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
    f"--xla_gpu_cuda_data_dir={sysconfig.get_paths()['purelib']}/nvidia/cuda_nvcc"
)

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import Config, from_config_dict
from apr_jax.engine.decode_cache import DecodePlan
from apr_jax.engine.scheduler import Limits
from apr_jax.engine.steps import COPIES_PER_CALL, PAGES, SHARDED, DecodeLanes, Policy, PrefillLanes, Steps
from apr_jax.engine.threads import MAX_STOP_TOKENS
from apr_jax.model.attention import self_attention
from apr_jax.model.decode_weights import choose_layout, layout_shardings, to_layout
from apr_jax.model.kv_cache import PagedKVCache, RowBuffers
from apr_jax.model.llama import abstract_params
from apr_jax.parallel.mesh import make_mesh
from configs.grpo import get_config
from tests.engine.hlo import collectives, collectives_over_data, copies_of

MESHES = {"v5e:2x2": [(1, 1), (2, 2)], "v5p:2x2x1": [(1, 1), (2, 2)], "h100": [(1, 1), (2, 2), (8, 1)]}  # data, tensor
_NVIDIA = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"
# libtpu asks the machine what it is; these answer for a machine that isn't a TPU's, and let it run beside another.
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ACCELERATOR_TYPES = {"v5e:2x2": "v5litepod-4", "v5p:2x2x1": "v5p-8"}
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|[^"]*triton[^"]*|__cudnn[^"]*)"')


def devices(target: str) -> list[Any]:
    """Devices to compile for, named as TPU topologies are; "h100" is eight in one machine."""
    if target != "h100":
        os.environ.update(LIBTPU, TPU_ACCELERATOR_TYPE=ACCELERATOR_TYPES[target])
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    ctypes.CDLL(str(_NVIDIA / "cudnn" / "lib" / "libcudnn.so.9"), mode=ctypes.RTLD_GLOBAL)
    fused_attention.check_cudnn_version = lambda: 91100  # JAX asks the GPU's machine
    spec = pathlib.Path(__file__).with_name("h100.txtpb").read_text(encoding="utf-8")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=spec, topology="1x1x8"
    ).devices
    return list(found)


def paper_config(data: int, tensor: int) -> Config:
    """The `:paper` variant on a mesh; lanes and pages are per data shard."""
    values = get_config("paper")
    values.mesh.update(data=data, fsdp=1, tensor=tensor)
    for field in ("num_lanes", "num_pages", "prefill_lanes"):
        values.rollout[field] *= data
    for section, field in (("sft", "rows_per_step"), ("sft", "validation_rows"), ("grpo", "rows_per_microbatch")):
        values[section][field] *= data
    return from_config_dict(values)


def programs(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What the engine runs, lowered for the mesh's devices."""
    model, rollout, shards = config.model, config.rollout, config.mesh.data
    plan = DecodePlan.of(model, rollout.decode_attention, rollout.page_size, mesh)
    limits = Limits(
        num_shards=shards,
        lanes=rollout.num_lanes // shards,
        pages=rollout.num_pages // shards,
        page_size=rollout.page_size,
        max_seq_len=model.max_seq_len,
        steps_per_visit=rollout.steps_per_visit,
        prefill_lanes=rollout.prefill_lanes // shards,
        prefix_reuse=True,
        block_size=plan.layout.block_size,
        row_blocks=plan.row_blocks(rollout.num_lanes // shards, rollout.num_pages // shards),
    )
    layout = choose_layout(model, mesh)
    steps = Steps(model, limits, mesh, layout, plan)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32, spec: PartitionSpec = SHARDED) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.eval_shape(lambda p: to_layout(p, model, layout), abstract_params(model))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, layout_shardings(mesh, model, layout)
    )

    def create() -> tuple[PagedKVCache, RowBuffers]:
        pages = PagedKVCache.create(model, shards, limits.pages, limits.page_size, plan.layout.tile)
        return pages, plan.buffers(model, shards, limits.row_blocks, limits.lanes)

    pages, rows = jax.tree.map(lambda x: array(x.shape, x.dtype, PAGES), jax.eval_shape(create))
    L, R, whole = (shards, limits.lanes), steps.layout.pages_per_row, PartitionSpec()
    lanes = DecodeLanes(
        *[array(L)] * 3, array((*L, MAX_STOP_TOKENS)), array((*L, 2), jnp.uint32), array(L), array((*L, R))
    )
    policy = Policy(array((), jnp.float32, whole), array((model.vocab_size,), bool, whole))
    L = (shards, limits.prefill_lanes)
    prefill = PrefillLanes(array((*L, limits.page_size)), array(L), array(L), array((*L, R)))
    fresh = steps._compute.eval_shape(pages, params, prefill)
    fresh = jax.tree.map(lambda x: array(x.shape, x.dtype, PAGES), fresh)
    copies = array((shards, COPIES_PER_CALL))
    return {
        "decode": steps.decode.lower(pages, rows, params, lanes, policy),
        "prefill": steps._compute.lower(pages, params, prefill),
        "prefill_write": steps._write.lower(pages, prefill, fresh),
        "copy_pages": steps.copy_pages.lower(pages, copies, copies),
    }


def training_attention(config: Config, mesh: Mesh, impl: str) -> Any:
    """One layer's attention over a microbatch, forward and backward, with a training kernel."""
    model = config.model
    B, T = config.grpo.rows_per_microbatch, config.grpo.row_len

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(self_attention(q, k, v, segment_ids_BT=ids, impl=impl).astype(jnp.float32))

    def array(shape: tuple[int, ...], dtype: Any, *axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    heads = (("data", "fsdp"), None, "tensor", None)
    q = array((B, T, model.num_heads, model.head_dim), jnp.bfloat16, *heads)
    kv = array((B, T, model.num_kv_heads, model.head_dim), jnp.bfloat16, *heads)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, array((B, T), jnp.int32, ("data", "fsdp")))


def describe(lowered: Any, config: Config, mesh: Mesh) -> dict[str, Any]:
    """What the compiled program needs, calls and communicates."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    costs = costs or {}  # XLA's GPU compiler gives none
    pool = config.rollout.num_pages * config.rollout.page_size * config.model.num_kv_heads * config.model.head_dim
    return {
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": costs.get("flops"),
        "bytes_accessed": costs.get("bytes accessed"),
        "kernels": sorted(set(KERNEL.findall(text))),
        "num_kernels": len(KERNEL.findall(text)),
        "page_copies": len(copies_of(text, {pool // mesh.size})),
        "collectives": len(collectives(text)),
        "collectives_over_data": len(collectives_over_data(text, mesh)),
        "text": text,
    }


def compile_all(target: str, layers: int | None, hlo: str | None) -> dict[str, Any]:
    """Every program on every mesh of a target, described."""
    found, results = devices(target), {}
    for data, tensor in MESHES[target]:
        config = paper_config(data, tensor)
        if layers:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
        mesh = make_mesh(config.mesh, found)
        lowered = programs(config, mesh)
        lowered["train_attention"] = training_attention(config, mesh, "cudnn" if target == "h100" else "splash")
        for name, program in lowered.items():
            result = describe(program, config, mesh)
            text = result.pop("text")
            if hlo:
                folder = pathlib.Path(hlo)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}_data{data}_tensor{tensor}.txt").write_text(text)
            results[f"{name} data={data} tensor={tensor}"] = result
    return {"target": target, "device": found[0].device_kind, "programs": results}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown. XLA counts a loop's body once: FLOPs and bytes of decode are those of one step."""
    lines = [
        f"| {result['device']} | arguments | temporaries | pages aliased | GFLOP | GB accessed | kernels |",
        "|---|---|---|---|---|---|---|",
    ]

    def scaled(value: float | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:,.2f}"

    for name, row in result["programs"].items():
        cells = [
            name,
            f"{row['argument_bytes'] / 1e9:.2f} GB",
            f"{row['temp_bytes'] / 1e6:,.1f} MB",
            f"{row['alias_bytes'] / 1e9:.2f} GB",
            scaled(row["flops"], 1e9),
            scaled(row["bytes_accessed"], 1e9),
            f"{row['num_kernels']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=MESHES)
    parser.add_argument("--layers", type=int, help="of the model [all]")
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON")
    parser.add_argument("--hlo", help="write the optimised programs into this folder")
    arguments = parser.parse_args()
    result = compile_all(arguments.target, arguments.layers, arguments.hlo)
    print(table(result) if arguments.table else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
