"""The common part of the peers' scripts: the workload comes in as JSON, the measurements go out as JSON.

    .venv-peers/NAME/bin/python launch/peers/peer_NAME.py --workload=workload.json --out=report.json

Only the standard library is used, because each peer has an environment of its own, without apr_jax. The report, which
`apr_jax/bench/peers.py` reads, is rewritten after each measurement, so a run that is stopped keeps what it measured.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

PRECISIONS = ("float32", "bfloat16")  # of weights, cache and products
REPEATS = 2  # the fastest pass counts: other work on the machine only ever slows one down


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A Hugging Face folder `model`, and prompts: the first L are the batch of L lanes, each decoded greedily."""

    model: str
    prompts: list[list[int]]
    lanes: list[int]
    new_tokens: int  # of each lane, at least 2: the first belongs to the prefill
    precision: str
    threads: int
    seconds_limit: float  # for the whole script; whoever started it ends it then
    device: str = "cpu"  # or "gpu"
    quick: bool = False  # one pass at each lane count, in the peer's first mode alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One decoded batch. `steps` counts each lane's tokens in `decode_seconds`, the first one excluded."""

    prefill_seconds: float  # the prompts, and each lane's first token
    decode_seconds: float
    steps: int
    tokens: list[list[int]]  # what each lane wrote, the first token included


Decode = Callable[[list[list[int]]], Pass]


def main(name: str, version: str, method: str, modes: Callable[[Workload], dict[str, Callable[[], Decode]]]) -> None:
    """Measure every mode of a peer at every lane count, and report the fastest mode of each.

    A mode is a way to use the peer; calling it loads the model and returns a function that decodes a batch. `method`
    says how prefill and decode were told apart.
    """
    workload, out = _arguments()
    started = time.perf_counter()
    report: dict[str, Any] = {
        "name": name,
        "version": version,
        "method": method,
        "lanes": {},
        "modes": {},
        "greedy_tokens": {},
    }
    for mode, load in list(modes(workload).items())[: 1 if workload.quick else None]:
        decode = load()
        for lanes in workload.lanes:
            repeats, warm_ups = (1, lanes == workload.lanes[0]) if workload.quick else (REPEATS, 1)
            row, tokens = _measure(decode, workload.prompts[:lanes], workload.new_tokens, repeats, warm_ups)
            report["modes"].setdefault(mode, {})[str(lanes)] = row
            best = report["lanes"].get(str(lanes))
            if best is None or row["tokens_per_second"] > best["tokens_per_second"]:
                report["lanes"][str(lanes)] = {**row, "mode": mode}
            report["greedy_tokens"].setdefault(mode, tokens[0])
            report["seconds"] = time.perf_counter() - started
            _write(out, report)
            print(f"{name} {mode}: {lanes} lanes, {row['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)


def _arguments() -> tuple[Workload, pathlib.Path]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    workload = Workload(**json.loads(arguments.workload.read_text()))
    if workload.precision not in PRECISIONS:
        sys.exit(f"precision {workload.precision!r}: the peers are run in {' or '.join(PRECISIONS)}")
    if workload.new_tokens < 2 or max(workload.lanes) > len(workload.prompts):
        sys.exit("a workload needs two new tokens or more, and a prompt for every lane")
    return workload, arguments.out


def _measure(
    decode: Decode, prompts: list[list[int]], new_tokens: int, repeats: int, warm_ups: int
) -> tuple[dict[str, float], list[list[int]]]:
    """Return the fastest of `repeats` passes, after those that warm up (compile, touch memory)."""
    started = time.perf_counter()
    for _ in range(warm_ups):
        decode(prompts)
    warm_up = time.perf_counter() - started
    waited, began = _waited_for_a_core(), time.perf_counter()
    passes = [decode(prompts) for _ in range(repeats)]
    waited, wall = _waited_for_a_core() - waited, time.perf_counter() - began
    best = min(passes, key=lambda run: run.decode_seconds / run.steps)
    if any(len(tokens) != new_tokens for tokens in best.tokens):
        sys.exit(f"lanes wrote {sorted({len(tokens) for tokens in best.tokens})} tokens instead of {new_tokens}")
    row = {
        "tokens_per_second": len(prompts) * best.steps / best.decode_seconds,
        "ms_per_step": best.decode_seconds / best.steps * 1e3,
        "prefill_seconds": min(run.prefill_seconds for run in passes),
        "warm_up_seconds": warm_up,
        "contention": max(0.0, waited / wall),
    }
    return row, best.tokens


def _waited_for_a_core() -> float:
    """Return the seconds in which this process's threads were ready but had no core (Linux only, else 0).

    Per second of a measurement this says how far to trust it: near 0 on a machine of its own.
    """
    waits = [path.read_text().split()[1] for path in pathlib.Path("/proc/self/task").glob("*/schedstat")]
    return sum(map(int, waits)) / 1e9


def _write(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Write the report atomically, so that a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)
