"""Measure decode speed: by lane count against the machine's limits, on real problems, and beside other systems.

    python launch/benchmark_decode.py                                                  # the main job's model
    python launch/benchmark_decode.py --config=configs/benchmark_decode.py:paper       # the 228M model
    python launch/benchmark_decode.py --peers=hf,tunix,vllm,llama_cpp --json=decode.json --plot=decode.svg
    python launch/benchmark_decode.py --checkpoint=FILE.gguf --config.mesh.data=1 --lanes=1,8,16,64 \\
      --peers=hf,llama_cpp --peer_lanes=1,8,16,64 --prompt=16 --new=64 --quick      # under three minutes

Weights are random, because speed depends on shapes only, or those of a policy, dequantised. `make peers` makes the
peers' environments first.
Exit codes: 0 done, 1 failed, 2 bad arguments or config.
"""

import functools
import os
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.checkpoints.identity import with_auto
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.evaluation.rollout_sources import check_policy_folder

_CONFIG = entry.define_config("benchmark_decode.py")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Measure this policy: a run, a Hugging Face folder, FILE.gguf.")
_LANES = flags.DEFINE_list("lanes", ["1", "8", "16", "64", "128"], "Lane counts to measure; empty: none.")
_PROMPT = entry.define_number("prompt", 64, "Tokens of a lane's prompt.", low=2)
_NEW = entry.define_number("new", 96, "Tokens that a lane decodes.", low=2)
_PROBLEMS = entry.define_number("problems", None, "Problems of the APR workload, 0: none [up to 256].", low=0)
_PEERS = flags.DEFINE_list("peers", [], "Other systems to measure: hf, tunix, vllm, llama_cpp.")
_PEER_LANES = flags.DEFINE_list("peer_lanes", ["1", "16", "64"], "Lane counts to measure peers at (of --lanes).")
_PEER_SECONDS = entry.define_number("peer_seconds", 900.0, "Time limit of one peer.", low=1.0)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Time one pass of each lane count, ours before the peers alone, a peer in one mode."
)
_JSON = entry.JsonFlag("the figures")
_PLOT = entry.define_output("plot", "Draw tokens/s by lane count here.", (".svg", ".png"))


def main() -> None:
    checkpoint = pathlib.Path(_CHECKPOINT.value) if _CHECKPOINT.value else None
    if checkpoint is not None:
        check_policy_folder(checkpoint)
    config = from_config_dict(with_auto(_CONFIG.values(), checkpoint))
    lanes = entry.positive_numbers("lanes", _LANES.value)
    peer_lanes = entry.positive_numbers("peer_lanes", _PEER_LANES.value)
    if _PEERS.value and not set(peer_lanes) <= set(lanes):
        raise ConfigError(f"--peer_lanes={','.join(map(str, peer_lanes))} must be among --lanes")
    if _PLOT.value and not lanes:
        raise ConfigError("--plot draws the figures of --lanes, and there are none")
    from apr_jax.bench.peers import PEERS

    if unknown := [name for name in _PEERS.value if name not in PEERS]:
        raise ConfigError(f"--peers: there is no peer {unknown[0]!r}; choose of {', '.join(PEERS)}")
    figures = _measure(config, lanes, peer_lanes)
    if _PLOT.value:
        from apr_jax.bench.decode_report import write_plot

        write_plot(_PLOT.value, figures)
    _JSON.write(figures)


def _measure(config: Config, lanes: tuple[int, ...], peer_lanes: tuple[int, ...]) -> dict[str, Any]:
    """Measure everything that was asked for, and print each part when it is done."""
    from apr_jax.bench import decode
    from apr_jax.bench.agreement import sharp_params
    from apr_jax.parallel.fit import fit_to
    from apr_jax.parallel.mesh import make_mesh

    # Before the weights start JAX: a CPU is split into as many devices as the mesh needs.
    config = fit_to(config, make_mesh(config.mesh))
    lengths = decode.Lengths(prompt=_PROMPT.value, new=_NEW.value)
    repeats = 1 if _QUICK.value else decode.REPEATS
    if _CHECKPOINT.value:
        config, params = decode.policy_to_measure(pathlib.Path(_CHECKPOINT.value), config, lengths)
    else:
        params = sharp_params(config.model, config.seed)
    figures = decode.about(config)
    if lanes:
        figures = decode.benchmark_decode(config, params, lanes, lengths, _say, repeats)
        print(decode.table(figures), flush=True)
    if _PROBLEMS.value != 0 and not _CHECKPOINT.value:
        figures["workload_of_problems"] = _replays(config, params)
    if _PEERS.value:
        figures |= _peers(config, params, peer_lanes, lengths)
        if not _QUICK.value and any(report.get("lanes") for report in figures["peers"].values()):
            again = decode.benchmark_decode(config, params, peer_lanes, lengths, _say, repeats)
            figures["lanes_after_peers"] = again["lanes"]
        from apr_jax.bench.decode_report import peers_table

        print(peers_table(figures), flush=True)
    return figures


def _replays(config: Config, params: Any) -> dict[str, Any]:
    from apr_jax.bench.replay import benchmark_replays, make_replays, show
    from apr_jax.data.tokenizer import config_tokenizer
    from apr_jax.engine.engine import Engine
    from apr_jax.evaluation.run import ShownProgress
    from apr_jax.parallel.mesh import make_mesh

    replays = make_replays(config, config_tokenizer(config), _PROBLEMS.value)
    mesh = make_mesh(config.mesh)
    engine = Engine(config.model, config.engine, config.rollout, mesh, params=params, banned_tokens=())
    print(f"engine memory: {engine.memory}", flush=True)
    engine.warm_up()
    with ShownProgress(len(replays), "Problems") as on_progress:
        figures = benchmark_replays(engine, replays, config.seed, on_progress)
    print(show(figures), flush=True)
    return figures


def _peers(config: Config, params: Any, lanes: tuple[int, ...], lengths: Any) -> dict[str, Any]:
    from apr_jax.bench import agreement, decode
    from apr_jax.bench.peers import Workload, run_peers
    from apr_jax.model.weights.hf import save_hf

    prompts = decode.make_prompts(config, max(lanes), lengths)
    regret = functools.partial(agreement.regret, prompts[0], model=config.model, params=params)
    with tempfile.TemporaryDirectory(prefix="apr_jax-") as folder:
        save_hf(folder, config.model, params)
        workload = Workload(
            model=folder,
            prompts=prompts,
            lanes=lanes,
            new_tokens=lengths.new,
            precision=config.model.compute_dtype,
            threads=os.cpu_count() or 1,
            seconds_limit=_PEER_SECONDS.value,
            quick=_QUICK.value,
        )
        reports: dict[str, Any] = {}
        for name in _PEERS.value:
            _say(name)
            reports |= run_peers([name], workload, regret)
    return {"peers": reports, "workload": {"lanes": lanes, "precision": config.model.compute_dtype}}


def _say(what: int | str) -> None:
    print(f"measuring {what} lanes" if isinstance(what, int) else f"measuring {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main)
