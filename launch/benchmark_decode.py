"""Measure decode speed: by lane count against the machine's limits, on real problems, and beside other systems.

    python launch/benchmark_decode.py                                                  # the main job's model
    python launch/benchmark_decode.py --config=configs/benchmark_decode.py:paper       # the 228M model
    python launch/benchmark_decode.py --peers=hf,tunix,vllm,llama_cpp --json=decode.json --plot=decode.svg
    python launch/benchmark_decode.py --checkpoint=FILE.gguf --config.mesh.data=1 --lanes=1,8,16,64 \\
      --peers=hf,llama_cpp --peer_lanes=1,8,16,64 --prompt=16 --new=64 --quick      # under three minutes

On a CPU the lanes are 1 to 128, with short contexts. On accelerators they are 64 to 1,024 for each data shard, with
contexts of 400 and 2,048 tokens, as many lanes as fit; --config.mesh.data= splits them over devices.
Weights are random, because speed depends on shapes only, or those of a policy, dequantised. `make peers` makes the
peers' environments first.
Exit codes: 0 done, 1 failed, 2 bad arguments or config.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.checkpoints.identity import with_auto
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.evaluation.rollout_sources import given_policy

_CONFIG = entry.define_config("benchmark_decode.py")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Measure this policy: a run, a Hugging Face folder, FILE.gguf.")
_LANES = flags.DEFINE_list("lanes", None, "Lane counts to measure; empty: none [1 to 128; accelerators: 64 to 1,024].")
_CONTEXTS = flags.DEFINE_list(
    "contexts", None, "Tokens that a lane holds on average [those of --prompt and --new; accelerators: 400,2048]."
)
_PROMPT = entry.define_number("prompt", None, "Tokens of a lane's prompt [64].", low=2)
_NEW = entry.define_number("new", None, "Tokens that a lane decodes [96; accelerators: 640, or what fits].", low=2)
_SECONDS = entry.define_number("seconds", None, "Decode each row for so long [3 passes; accelerators: 2 s].", low=0.0)
_PROBLEMS = entry.define_number("problems", None, "Problems of the APR workload, 0: none [up to 256].", low=0)
_PEERS = flags.DEFINE_list("peers", [], "Other systems to measure: hf, tunix, vllm, llama_cpp.")
_PEER_LANES = flags.DEFINE_list(
    "peer_lanes", None, "Lane counts to measure peers at, of --lanes [1,16,64; accelerators: 64,256]."
)
_PEER_SECONDS = entry.define_number("peer_seconds", 900.0, "Time limit of one peer.", low=1.0)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Time one pass of each lane count, ours before the peers alone, a peer in one mode."
)
_JSON = entry.JsonFlag("the figures")
_PLOT = entry.define_output("plot", "Draw tokens/s by lane count here.", (".svg", ".png"))


def main() -> None:
    checkpoint = given_policy(_CHECKPOINT.value) if _CHECKPOINT.value else None
    config = from_config_dict(with_auto(_CONFIG.values(), checkpoint))
    lanes, contexts, peer_lanes = (
        None if flag.value is None else entry.positive_numbers(flag.name, flag.value)
        for flag in (_LANES, _CONTEXTS, _PEER_LANES)
    )
    if contexts is not None and (_PROMPT.value is not None or not contexts):
        raise ConfigError("--contexts takes lengths, and --prompt follows from each; give one of the two")
    if _PLOT.value and lanes == ():
        raise ConfigError("--plot draws the figures of --lanes, and there are none")
    from apr_jax.bench.peers import PEERS, leave_memory_to_peers

    if unknown := [name for name in _PEERS.value if name not in PEERS]:
        raise ConfigError(f"--peers: there is no peer {unknown[0]!r}; choose of {', '.join(PEERS)}")
    if _PEERS.value:
        leave_memory_to_peers()
    figures = _measure(config, checkpoint, lanes, contexts, peer_lanes)
    if _PLOT.value:
        from apr_jax.bench.decode_report import write_plot

        write_plot(_PLOT.value, figures)
    _JSON.write(figures)


def _measure(
    config: Config,
    checkpoint: pathlib.Path | None,
    lanes: tuple[int, ...] | None,
    contexts: tuple[int, ...] | None,
    peer_lanes: tuple[int, ...] | None,
) -> dict[str, Any]:
    """Measure everything that was asked for, and print each part when it is done."""
    from apr_jax.bench import decode
    from apr_jax.bench.agreement import sharp_params
    from apr_jax.parallel.fit import fit_to
    from apr_jax.parallel.mesh import make_mesh

    mesh = make_mesh(config.mesh)  # before the weights start JAX: a CPU is split into as many devices as it needs
    if _PEERS.value and mesh.devices.flat[0].platform == "tpu":
        raise ConfigError("--peers: a TPU serves one process at a time; compare with peers on a GPU or a CPU")
    config = fit_to(config, mesh)
    effort = decode.Effort.on(mesh, config)
    if _QUICK.value:
        effort = dataclasses.replace(effort, passes=1, seconds=0.0)
    if _SECONDS.value is not None:
        effort = dataclasses.replace(effort, passes=1, seconds=_SECONDS.value)
    if _NEW.value is not None:
        effort = dataclasses.replace(effort, new=_NEW.value)
    lengths = decode.lengths_to_measure(config.model, mesh, effort, contexts, _PROMPT.value)
    if checkpoint is not None:
        config, params = decode.policy_to_measure(checkpoint, config, lengths[-1])
    else:
        params = sharp_params(config.model, config.seed)
    counts = [decode.lanes_to_measure(config, params, mesh, lanes, each, effort, _say) for each in lengths]
    if _PEERS.value:
        peer_lanes = _check_peer_lanes(peer_lanes, effort.peer_lanes, counts[0])
    parts = []
    for each, of_each in zip(lengths, counts, strict=True):
        if of_each:
            parts.append(decode.benchmark_decode(config, params, of_each, each, effort, _say))
            print(decode.table(parts[-1]), flush=True)
    figures = parts[0] if parts else decode.about(config, mesh)
    if parts[1:]:
        figures["other_contexts"] = parts[1:]
    if _PROBLEMS.value != 0 and not _CHECKPOINT.value:
        figures["workload_of_problems"] = _replays(config, mesh, params)
    if _PEERS.value and peer_lanes:
        figures |= _peers(config, params, peer_lanes, lengths[0])
        if not _QUICK.value and any(report.get("lanes") for report in figures["peers"].values()):
            again = decode.benchmark_decode(config, params, peer_lanes, lengths[0], effort, _say)
            figures["lanes_after_peers"] = again["lanes"]
        from apr_jax.bench.decode_report import peers_table

        print(peers_table(figures), flush=True)
    return figures


def _check_peer_lanes(asked: tuple[int, ...] | None, default: tuple[int, ...], lanes: Sequence[int]) -> tuple[int, ...]:
    """Return the lane counts to measure peers at, which ours are measured at too. Raise ConfigError for others."""
    if asked is not None and not set(asked) <= set(lanes):
        raise ConfigError(f"--peer_lanes={','.join(map(str, asked))} must be among --lanes")
    chosen = tuple(count for count in default if count in lanes) if asked is None else asked
    if not chosen:
        raise ConfigError("--peers need --peer_lanes, which are among --lanes")
    return chosen


def _replays(config: Config, mesh: Any, params: Any) -> dict[str, Any]:
    from apr_jax.bench.replay import benchmark_replays, make_replays, show
    from apr_jax.data.tokenizer import config_tokenizer
    from apr_jax.engine.engine import Engine
    from apr_jax.evaluation.run import ShownProgress

    engine = Engine(config.model, config.engine, config.rollout, mesh, params=params, banned_tokens=())
    lanes = engine.limits.lanes * engine.limits.num_shards
    replays = make_replays(config, config_tokenizer(config), _PROBLEMS.value, lanes)
    print(f"engine memory: {engine.memory}", flush=True)
    engine.warm_up()
    with ShownProgress(len(replays), "Problems") as on_progress:
        figures = benchmark_replays(engine, replays, config.seed, on_progress)
    print(show(figures), flush=True)
    return figures


def _peers(config: Config, params: Any, lanes: tuple[int, ...], lengths: Any) -> dict[str, Any]:
    import jax

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
            device=jax.devices()[0].platform,
            quick=_QUICK.value,
        )
        reports: dict[str, Any] = {}
        for name in _PEERS.value:
            _say(f"measuring {name}")
            reports |= run_peers([name], workload, regret)
    return {"peers": reports, "workload": {"lanes": lanes, "precision": config.model.compute_dtype}}


def _say(what: int | str) -> None:
    print(f"measuring {what} lanes" if isinstance(what, int) else what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main)
