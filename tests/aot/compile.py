"""Compiles the engine's programs of the 228M model for accelerators that are not there, and says what came out.

    .venv-aot/bin/python -m tests.aot.compile tpu:v5e:2x2 --table      # or tpu:v5p:2x2x1, or gpu:h100:8

One JSON object, or a Markdown table. `make test-aot` makes the environment that this needs (docs/accelerators.md).
"""

import argparse
import dataclasses
import json
import pathlib
import re
import time
from typing import Any

from apr_jax.aot.topology import compile_only_devices, parse_topology, prepare_process
from apr_jax.config import Config, MeshConfig
from apr_jax.config_dict import from_config_dict
from configs.grpo import get_config

MESHES = {  # data, tensor
    "tpu:v5e:2x2": [(1, 1), (2, 2)],
    "tpu:v5p:2x2x1": [(1, 1), (2, 2)],
    "gpu:h100:8": [(1, 1), (2, 2), (8, 1)],
}
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|[^"]*triton[^"]*|__cudnn[^"]*)"')


def paper_config(data: int, tensor: int) -> Config:
    """The `:paper` variant on a mesh, with as many lanes and pages on each data shard of every device."""
    from apr_jax.parallel.fit import fit

    config = from_config_dict(get_config("paper"))
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, lanes=64, pages=1_024))
    return fit(config, MeshConfig(data=data, fsdp=1, tensor=tensor), data * tensor)


def programs(config: Config, mesh: Any) -> dict[str, Any]:
    """What the engine runs, lowered for the mesh's devices."""
    from apr_jax.aot.compilation import engine_programs

    return {name: planned.jitted.lower(*planned.arguments) for name, planned in engine_programs(config, mesh).items()}


def training_attention(config: Config, mesh: Any, platform: str) -> Any:
    """One layer's attention over a microbatch, forward and backward, with the platform's kernel."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from apr_jax.data.segments import MIN_SLOTS
    from apr_jax.kernels import for_training

    model, kernels = config.model, for_training(config.model, platform)
    B, T = config.grpo.rows_per_microbatch, config.grpo.row_len

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        packed = kernels.packed
        out = kernels.attention(q, k, v, segments, None) if packed is None else packed(q, k, v, segments)
        return jnp.sum(out.astype(jnp.float32))

    def array(shape: tuple[int, ...], dtype: Any, *axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    heads = (("data", "fsdp"), None, "tensor", None)
    q = array((B, T, model.num_heads, model.head_dim), jnp.bfloat16, *heads)
    kv = array((B, T, model.num_kv_heads, model.head_dim), jnp.bfloat16, *heads)
    segments = array((B, T if kernels.packed is None else MIN_SLOTS), jnp.int32, ("data", "fsdp"))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, segments)


def describe(lowered: Any, config: Config, mesh: Any) -> dict[str, Any]:
    """What the compiled program needs, calls and communicates."""
    from tests.engine.hlo import collectives, collectives_over_data, copies_of

    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    costs = costs or {}  # XLA's GPU compiler gives none
    pool = config.engine.pages * config.engine.page_size * config.model.num_kv_heads * config.model.head_dim
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
        "conditionals": text.count(" conditional("),
        "page_copies": len(copies_of(text, {pool // mesh.shape["tensor"]})),
        "collectives": len(collectives(text)),
        "collectives_over_data": len(collectives_over_data(text, mesh)),
        "text": text,
    }


def compile_all(target: str, layers: int | None, hlo: str | None) -> dict[str, Any]:
    """Every program on every mesh of a target, described."""
    topology = parse_topology(target)
    prepare_process(topology)
    from apr_jax.parallel.mesh import make_mesh

    found, results = compile_only_devices(topology), {}
    for data, tensor in MESHES[target]:
        config = paper_config(data, tensor)
        if layers:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
        mesh = make_mesh(config.mesh, found)
        lowered = programs(config, mesh)
        lowered["train_attention"] = training_attention(config, mesh, topology.platform)
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
