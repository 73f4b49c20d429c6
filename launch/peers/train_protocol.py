"""The common part of the training peers' scripts. Passes are asked for one by one, so that ours can run in between.

    .venv-peers/ENVIRONMENT/bin/python launch/peers/peer_NAME.py --workload=workload.json

On start the script writes one JSON line about itself, `{"version", "method", "modes"}`. Then it reads names of modes,
one a line, runs one pass of each and answers with one JSON line: `{"seconds": [..], "losses": [..], "contention"}`, or
`{"error"}`. It ends with its input. `apr_jax/bench/training_peers.py` is the other side. All other output goes to
stderr. Only the standard library is used, because each peer has an environment of its own.
"""

import argparse
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Workload = dict[str, Any]
Pass = Callable[[], tuple[list[float], list[float]]]  # runs some steps: the seconds and the loss of each


def main(version: str, method: str, modes: Callable[[Workload], dict[str, Callable[[], Pass]]]) -> None:
    """Serve passes until the input ends. A mode is loaded when first asked for; a pass begins from fresh weights.

    `modes(workload)` returns, by name, the functions that load a mode. `method` says what a step is.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True, type=pathlib.Path)
    workload: Workload = json.loads(parser.parse_args().workload.read_text())
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    known, loaded = modes(workload), {}
    answer({"version": version, "method": method, "modes": list(known)})
    for line in sys.stdin:
        mode = line.strip()
        try:
            if mode not in loaded:
                loaded[mode] = known[mode]()
            answer(_time(loaded[mode]))
        except Exception as error:  # a mode that fails must not take the others along
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"})


def _time(run: Pass) -> dict[str, Any]:
    waited, began = _waited_for_a_core(), time.perf_counter()
    seconds, losses = run()
    wall = time.perf_counter() - began
    return {"seconds": seconds, "losses": losses, "contention": max(0.0, (_waited_for_a_core() - waited) / wall)}


def _waited_for_a_core() -> float:
    """Return the seconds in which this process's threads were ready but had no core (Linux only, else 0)."""
    waits = [path.read_text().split()[1] for path in pathlib.Path("/proc/self/task").glob("*/schedstat")]
    return sum(map(int, waits)) / 1e9
