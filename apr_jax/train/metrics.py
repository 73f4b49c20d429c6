"""The metrics files of a run, with times apart from numbers that a rerun reproduces.

`metrics.jsonl` holds only values that the seed determines, so that a run which was killed and resumed leaves the same
file, byte for byte, as one that was not. It is a result: where it cannot be written, the run ends. The rest is for
people to look at. Times and rates go to `timings.jsonl`, and both to TensorBoard; some rollouts go to `grpo_rollouts/`.
Where one of these cannot be written, a message says so and the run goes on without it.
"""

import contextlib
import json
import math
import pathlib
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from apr_jax import files
from apr_jax.checkpoints.phases import PhaseName
from apr_jax.checkpoints.step_log import missing_steps, place, read_step_log
from apr_jax.train.board import Board

Values = Mapping[str, float | int | Mapping[str, int]]


class MetricsWriter:
    """A writer that appends one JSON object a step to files in a run folder. Use as a context manager.

    On opening it cuts the lines that a killed run wrote after its last complete checkpoint (`cut`). A step before that
    place that is done once more is not written again. With `writes` off, as on all hosts of a job but the first,
    nothing reaches the folder.

    Attributes:
      crc: the CRC-32 of metrics.jsonl so far.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        phase: PhaseName,
        step: int,
        *,
        done: Mapping[PhaseName, int] | None = None,
        crc: int | None = None,
        writes: bool = True,
    ) -> None:
        """Open the files of `workdir`, from (`phase`, `step`) on. Other arguments are those of `cut`."""
        self._workdir, self._writes, self._last, self.crc = workdir, writes, place(phase, step), 0
        metrics, self._timings_path = workdir / "metrics.jsonl", workdir / "timings.jsonl"
        self._metrics, self._timings = files.GrowingFile(metrics), files.GrowingFile(self._timings_path)
        self._given_up: set[pathlib.Path] = set()
        self._board_folder = workdir / "tensorboard"
        self._board = Board(self._board_folder)
        if writes:
            self.crc = cut(metrics, phase, step, done or {}, crc)
            self._aside(self._timings_path, lambda: cut(self._timings_path, phase, step))

    def write(self, phase: PhaseName, step: int, metrics: Values) -> None:
        """Write a step's metrics. Values that are not finite become null where `skipped_rate` is above 0.

        Elsewhere such a value raises FloatingPointError, because nothing after it would mean anything.
        """
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken and not metrics.get("skipped_rate"):
            raise FloatingPointError(f"{phase} step {step}: {broken[0]} is {metrics[broken[0]]}")
        finite = {name: value for name, value in metrics.items() if name not in broken}
        if not self._writes or place(phase, step) <= self._last:
            return
        line = _line(phase, step, {**metrics, **dict.fromkeys(broken)})
        self._metrics.add(line)
        self.crc = zlib.crc32(line, self.crc)
        self._draw(phase, step, finite)

    def write_timings(self, phase: PhaseName, step: int, timings: Values) -> None:
        """Write a step's times and rates."""
        if self._writes and place(phase, step) > self._last:
            self._aside(self._timings_path, lambda: self._timings.add(_line(phase, step, timings)))
            self._draw(f"{phase}/time", step, timings)

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write WORKDIR/grpo_rollouts/STEP.jsonl: rollouts that a step learnt from (train/rl/kept_rollouts.py)."""
        path = self._workdir / "grpo_rollouts" / f"{step}.jsonl"
        if self._writes:
            self._aside(path.parent, lambda: files.write_jsonl(path, records))

    def sync(self) -> None:
        """Make the lines so far survive a crash of the machine. A checkpoint that counts on them comes after it."""
        if self._writes:
            self._metrics.sync()

    def _draw(self, prefix: str, step: int, values: Values) -> None:
        self._aside(self._board_folder, lambda: self._board.add(step, _flat(prefix, values)))

    def _aside(self, path: pathlib.Path, write: Callable[[], object]) -> None:
        """Write to `path`, unless that has failed before. A failure is a message, and no more."""
        if path in self._given_up:
            return
        try:
            write()
        except OSError as error:
            self._given_up.add(path)
            print(f"{path}: {error.strerror or error}; the run goes on without it", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writes:
            self._aside(self._board_folder, self._board.close)
            self._aside(self._timings_path, self._timings.sync)
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
            self.sync()


def cut(
    path: pathlib.Path, phase: PhaseName, step: int, done: Mapping[PhaseName, int] | None = None, crc: int | None = None
) -> int:
    """Drop the lines after (`phase`, `step`), a torn last line, and damaged ones. Return the CRC-32 of what is left.

    Where a line is damaged the file is kept as PATH.damaged. A message says which lines are damaged and which missing.

    Args:
      done: steps that the file must have, by their phase: the last of each.
      crc: the checksum that the lines must have, None if it is unknown.
    """
    log = read_step_log(path)
    kept = [
        (record, line)
        for record, line in zip(log.records, log.lines, strict=True)
        if place(record["phase"], record["step"]) <= place(phase, step)
    ]
    whole = b"".join(line for _, line in kept)
    problems = log.damage + missing_steps([record for record, _ in kept], done or {})
    if not problems and crc not in (None, zlib.crc32(whole)):
        problems = ["its lines are not those that were written"]
    if log.damage:
        before = path.with_name(path.name + ".damaged")
        files.write(before, path.read_bytes())
        problems.append(f"the file as it was is now {before}")
    if problems:
        print(f"{path}: {'; '.join(problems)}; the run goes on", file=sys.stderr)
    if path.exists() and path.read_bytes() != whole:
        files.write(path, whole)
    return zlib.crc32(whole)


def _line(phase: str, step: int, values: Mapping[str, Any]) -> bytes:
    return (json.dumps({"step": step, "phase": phase, **values}) + "\n").encode()


def _flat(prefix: str, values: Values) -> dict[str, float]:
    """Return all numbers by their path: {"sft/loss": 0.5, "grpo/reasons/no_call": 2}."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= _flat(f"{prefix}/{name}", value) if isinstance(value, Mapping) else {f"{prefix}/{name}": value}
    return flat
