"""Compile a run for accelerators that are not there: does it fit, on which mesh, and how fast can it be at best?

    make compile-aot TOPOLOGY=tpu:v5e:4x4 CONFIG=configs/grpo.py:paper        # makes the environment, then this
    python launch/compile_aot.py --config=configs/grpo.py:7b --topology=gpu:h100:8 --json=7b.json
    python launch/compile_aot.py --topology=tpu:v5p:2x2x1 --mesh=1,4,1        # no other mesh is tried
    python launch/compile_aot.py --topology=tpu:v5e:4x4 --quick               # from one and two layers: minutes

Figures are of one device (docs/scale.md). Exit codes: 0 all fits, 1 something does not, 2 bad arguments or config, or
a compiler that is not installed.
"""

import pathlib
import sys

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError

_CONFIG = entry.define_config("grpo.py:paper")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Accelerators to compile for: tpu:v5e:4x4, tpu:v5p:2x2x1, gpu:h100:8, .."
)
_MESH = flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR [the best that fits].")
_CANDIDATES = entry.define_number("candidates", 3, "Meshes that are compiled to find the best.", low=1)
_QUICK = flags.DEFINE_bool("quick", False, "Compile with one and with two layers, and extrapolate to all.")
_JSON = entry.JsonFlag("all figures")
_HLO = entry.define_folder("hlo", "Write the optimised programs into this folder.")


def main() -> None:
    config = _CONFIG.config()
    from apr_jax.aot.topology import EXAMPLES, compile_only_devices, parse_topology, prepare_process

    if not _TOPOLOGY.value:
        raise ConfigError(f"--topology says what to compile for: {', '.join(EXAMPLES)}")
    topology = parse_topology(_TOPOLOGY.value)
    prepare_process(topology)
    from apr_jax.aot.mesh_search import parse_mesh
    from apr_jax.aot.survey import Survey, tables

    mesh = parse_mesh(_MESH.value, topology.num_devices) if _MESH.value else None
    folder = pathlib.Path(_HLO.value) if _HLO.value else None

    def write(name: str, text: str) -> None:
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name.replace(' ', '_')}.txt").write_text(text, encoding="utf-8")

    survey = Survey(
        config,
        topology,
        compile_only_devices(topology),
        num_candidates=_CANDIDATES.value,
        quick=_QUICK.value,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        on_text=write if folder else None,
    )
    figures = survey.run(mesh)
    print(tables(figures))
    _JSON.write(figures)
    too_large = [name for name, row in figures["programs"].items() if not row["fits"]] + figures["refused"]
    if too_large:
        raise entry.FailedError(f"does not fit {topology.name}: {', '.join(too_large)}")


if __name__ == "__main__":
    entry.run(main)
