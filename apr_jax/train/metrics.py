"""The metrics files of a run, with times apart from numbers that a rerun reproduces.

`metrics.jsonl` holds only values that the seed determines, so that a run which was killed and resumed leaves the same
file, byte for byte, as one that was not. Times and rates go to `timings.jsonl`; TensorBoard gets both.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tensorboardX import SummaryWriter

from apr_jax import files

Values = Mapping[str, float | int | Mapping[str, int]]

_NOWHERE = pathlib.Path(os.devnull)


class MetricsWriter:
    """A writer that appends one JSON object a step to files in a run folder. Use as a context manager.

    On opening it cuts the lines that a killed run wrote after its last complete checkpoint (`cut`). With `writes` off,
    as on all hosts of a job but the first, nothing reaches the folder.
    """

    def __init__(
        self, workdir: pathlib.Path, phases: tuple[str, ...], phase: str, step: int, *, writes: bool = True
    ) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        names = ("metrics.jsonl", "timings.jsonl")
        for name in names if writes else ():
            cut(workdir / name, phases, phase, step)
        self._writes = writes
        self._metrics, self._timings = ((workdir / name if writes else _NOWHERE).open("a") for name in names)
        self._workdir = workdir
        folder = str(workdir / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=step + 1, flush_secs=10, write_to_disk=writes)

    def write(self, phase: str, step: int, metrics: Values) -> None:
        """Write a step's metrics. Values that are not finite become null where `skipped_rate` is above 0.

        Elsewhere such a value raises FloatingPointError, because nothing after it would mean anything.
        """
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken and not metrics.get("skipped_rate"):
            raise FloatingPointError(f"{phase} step {step}: {broken[0]} is {metrics[broken[0]]}")
        finite = {name: value for name, value in metrics.items() if name not in broken}
        _append(self._metrics, {"step": step, "phase": phase, **metrics, **dict.fromkeys(broken)})
        self._scalars(phase, step, finite)

    def write_timings(self, phase: str, step: int, timings: Values) -> None:
        _append(self._timings, {"step": step, "phase": phase, **timings})
        self._scalars(f"{phase}/time", step, timings)

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write WORKDIR/grpo_rollouts/STEP.jsonl: rollouts that a step learnt from (train/rl/kept_rollouts.py)."""
        if self._writes:
            files.write_jsonl(self._workdir / "grpo_rollouts" / f"{step}.jsonl", records)

    def sync(self) -> None:
        """Make the lines so far survive a crash of the machine. A checkpoint that counts on them comes after it."""
        for file in (self._metrics, self._timings):
            file.flush()
            if self._writes:
                os.fsync(file.fileno())

    def _scalars(self, prefix: str, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                self._scalars(f"{prefix}/{name}", step, value)
            else:
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._metrics.close()
        self._timings.close()
        self._board.close()


def cut(path: pathlib.Path, phases: tuple[str, ...], phase: str, step: int) -> None:
    """Drop lines after (`phase`, `step`) in the order of `phases`, and a torn last line."""
    if not path.exists():
        return
    kept = []
    last = (phases.index(phase), step)
    for line in path.read_text().splitlines(keepends=True):
        record = _parse(line)
        if record is not None and (phases.index(record["phase"]), record["step"]) <= last:
            kept.append(line)
    files.write(path, "".join(kept).encode())


def _parse(line: str) -> dict[str, Any] | None:
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _append(file: Any, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()
