"""Check a GPU's decoding against the CPU's, and measure its speed.

    make gpu-check                                                        # makes the environment, then this
    python launch/gpu_check.py --config=configs/grpo.py:smoke --lanes=1,64 --json=gpu.json

Each decode attention, in float32 and in bfloat16, is compared with full forwards in float32 on the CPU: tokens must be
the best ones except at ties within a tolerance, and log-probabilities equal within it. Then decode speed is measured.
Exit codes: 0 all agree, 1 something does not, 2 no GPU here, bad arguments or config.
"""

import dataclasses
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.config import Config, ConfigError

# Nats. On a CPU (D=1024, 4 layers) bfloat16 was off by 0.07 at most, and wrong positions by 7.5 (`sharp_params`).
TOLERANCES = {"float32": 2e-3, "bfloat16": 0.8}
STEPS = 64  # tokens that each checked thread writes, and again after it was cut back

_CONFIG = entry.define_config("grpo.py:paper")
_LANES = flags.DEFINE_list("lanes", ["1", "16", "64", "128"], "Lane counts to measure; empty: only check.")
_JSON = entry.JsonFlag("all figures")


def main() -> int:
    config = _CONFIG.config()
    lanes = entry.positive_numbers("lanes", _LANES.value)
    import jax

    kind = jax.devices()[0].device_kind
    if jax.devices()[0].platform != "gpu":
        raise ConfigError(f"no GPU here: JAX finds {len(jax.devices())} x {kind}. Nothing was checked")
    jax.config.update("jax_default_matmul_precision", "highest")  # type: ignore[no-untyped-call]
    checks = check(config)
    jax.config.update("jax_default_matmul_precision", None)  # type: ignore[no-untyped-call]
    speed = measure(config, lanes)
    _JSON.write({"device": kind, "checks": checks, "speed": speed})
    failed = [name for name, row in checks.items() if not row["agrees"]]
    if failed:
        raise entry.FailedError(f"the GPU does not decode what the CPU does: {', '.join(failed)}")
    return 0


def check(config: Config) -> dict[str, dict[str, Any]]:
    """Compare each decode attention in each dtype with the reference, and print a line about each."""
    from apr_jax.bench.agreement import agreement, decode_greedily, sharp_params
    from apr_jax.parallel.mesh import make_mesh

    params = sharp_params(config.model, config.seed)
    rollout = dataclasses.replace(config.rollout, max_steps=2 * STEPS)
    results = {}
    for dtype, tolerance in TOLERANCES.items():
        for attention in ("xla", "auto"):
            model = dataclasses.replace(config.model, compute_dtype=dtype)  # type: ignore[arg-type]
            sizes = dataclasses.replace(config.engine, lanes=8, decode_attention=attention)
            calls = decode_greedily(model, sizes, rollout, make_mesh(config.mesh), params, config.seed)
            found = agreement(calls, model, params)
            agrees = found.within(tolerance)
            results[f"{attention} {dtype}"] = {**dataclasses.asdict(found), "agrees": agrees}
            print(
                f"{attention:>5} {dtype:<9} {'agrees' if agrees else 'DIFFERS'}: {found.num_tokens} tokens, "
                f"{found.num_other} not the reference's best (by {found.max_regret:.1e} at most), log-probabilities "
                f"differ by {found.max_difference:.1e} at most, {found.mean_difference:.1e} on average"
            )
    return results


def measure(config: Config, lanes: tuple[int, ...]) -> dict[str, Any]:
    """Measure decode throughput by lane count, with either attention."""
    from apr_jax.bench import decode
    from apr_jax.bench.agreement import sharp_params

    speed, params = {}, sharp_params(config.model, config.seed)
    for attention in ("xla", "auto") if lanes else ():
        sizes = dataclasses.replace(config.engine, decode_attention=attention)
        figures = decode.benchmark_decode(dataclasses.replace(config, engine=sizes), params, lanes)
        print(f"\n{attention}: {decode.table(figures)}")
        speed[attention] = figures
    return speed


if __name__ == "__main__":
    entry.run(main)
