"""The parts of the reproduction, each one command line of another program of `launch/`, in the order in which they run.

WORKDIR/runs/NAME        policies: `facts`, where all SFT starts from, then SFT and GRPO of each way of reasoning
WORKDIR/comparisons/NAME what the claims are read from
WORKDIR/parts.json       the parts that are done, with their commands and seconds
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.config import ConfigError
from apr_jax.files import read_json, write_json
from apr_jax.paths import is_remote

OTHERS = ("tree_of_thoughts", "pasta", "hogwild")  # beside serial, whose cells are in the comparison of windows
_SFT = ("adaptive", "adaptive_budget", "serial", "serial_budget", "direct", *OTHERS)
_RL = {"adaptive_rl": "adaptive.rl", "serial_rl": "serial.rl", "adaptive_budget_rl": "adaptive_budget.rl"}
_PATH = {"adaptive_path": "adaptive.rl.path"}
_LANES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Part:
    """A command that makes one folder."""

    name: str
    what: str
    program: str  # of launch/
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()  # names of parts

    @property
    def command(self) -> tuple[str, ...]:
        """The command line after `python`."""
        return (f"launch/{self.program}", *self.flags)


def make_parts(workdir: pathlib.Path, config: str, words: str = "", *, quick: bool) -> list[Part]:
    """Return all parts, each after those that it needs.

    Args:
      config: the file of configs/ with the settings.
      words: what stands after the name of each variant, with dots between.
      quick: take the variants that learn nothing, and few problems.
    """
    runs = workdir / "runs"

    def train(name: str, variant: str, what: str, *flags: str, needs: tuple[str, ...] = ()) -> Part:
        variant = ".".join(filter(None, (variant, words, "quick" if quick else "")))
        data = () if is_remote(workdir) else (f"--config.data.directory={workdir / 'data'}",)
        chosen = (f"--config={config}:{variant}", f"--workdir={runs / name}", *data, *flags)
        return Part(name, what, "train.py", chosen, needs)

    parts = [train("facts", "facts", "bare arithmetic")]
    for name in _SFT:
        start = f"--start={runs / 'facts'}"
        parts.append(train(name, name, f"SFT of {name}, and its evaluation", start, needs=("facts",)))
    for name, variant in (_RL | _PATH).items():
        sft = variant.partition(".")[0]
        parts.append(train(name, variant, f"GRPO of {sft}", f"--checkpoint={runs / sft}", needs=(sft,)))
    return [*parts, *_comparisons(workdir, quick=quick)]


def _comparisons(workdir: pathlib.Path, *, quick: bool) -> list[Part]:
    def compare(name: str, what: str, policies: Sequence[str], *flags: str, problems: int) -> Part:
        named = ",".join(f"{policy}={workdir / 'runs' / policy}" for policy in policies)
        size = f"--num_problems={4 if quick else problems}"
        chosen = (f"--policies={named}", f"--workdir={workdir / 'comparisons' / name}", size, "--keep_rollouts=8")
        return Part(f"compare_{name}", what, "compare.py", (*chosen, *flags), tuple(policies))

    both = ("serial", "adaptive", "serial_rl", "adaptive_rl")
    windows = (512, 1_024) if quick else (384, 512, 768, 1_024, 1_536, 2_048)
    samples = 2 if quick else 8
    budgets = [f"adaptive_budget={n}" for n in (range(1, 3) if quick else range(1, 11))]
    budgets += [f"serial_budget={n}" for n in ((512,) if quick else (512, 1_024, 1_536, 2_048))]
    sampled = [f"cons@{samples}:{of}" for of in ("serial", "direct")]  # pass and best of n are in their records
    parts = [
        compare(
            "windows",
            "equal context: adaptive and serial, before and after RL",
            both,
            f"--context_windows={','.join(map(str, windows))}",
            problems=2_000,
        ),
        compare(
            "tokens",
            "equal tokens: budgets, and several samples",
            ("serial", "adaptive_budget", "serial_budget", "direct"),
            f"--methods=adaptive_budget,serial_budget,{','.join(sampled)}",
            f"--budgets={','.join(budgets)}",
            "--temperatures=1",
            problems=2_000,
        ),
        compare(
            "width",
            "ten children named, before and after RL",
            ("adaptive_budget", "adaptive_budget_rl"),
            "--budgets=10",
            problems=2_000,
        ),
        compare(
            "methods",
            "equal context: the other ways of reasoning",
            OTHERS,
            problems=2_000,
        ),
        compare(
            "path",
            "GRPO with and without a price on the longest chain",
            ("adaptive_rl", "adaptive_path"),
            problems=2_000,
        ),
    ]
    for lanes in _LANES:
        parts.append(
            compare(
                f"latency_{lanes}",
                f"equal latency, one problem at a time on {lanes} lanes",
                ("serial_rl", "adaptive_rl"),
                f"--context_windows={','.join(map(str, windows[-2:] if quick else windows[1:]))}",
                f"--config.engine.lanes={lanes}",
                f"--config.engine.pages={max(512, 160 * lanes)}",
                f"--config.engine.prefill_lanes={min(8, lanes)}",
                "--at_once=1",
                problems=200,
            )
        )
    return parts


def choose(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """Return the named parts in their order, all for no name. Raises ConfigError for a name that there is not."""
    unknown = [name for name in only if name not in {part.name for part in parts}]
    if unknown:
        raise ConfigError(f"--only={','.join(only)}: no part {unknown[0]}; --list shows their names")
    return [part for part in parts if not only or part.name in only]


class Record:
    """The parts that are done, in WORKDIR/parts.json."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._path = workdir / "parts.json"
        self._parts: dict[str, dict[str, Any]] = read_json(self._path) if self._path.exists() else {}

    def is_done(self, part: Part) -> bool:
        """Tell whether the part was done by the command that it has now."""
        return self._of(part).get("done", False)

    def seconds(self, part: Part) -> float:
        """Return how long the part has run so far, in all its starts."""
        return self._of(part).get("seconds", 0.0)

    def add(self, part: Part, seconds: float, *, done: bool) -> None:
        """Note a start of the part that has ended."""
        total = self.seconds(part) + seconds
        self._parts[part.name] = {"command": list(part.command), "seconds": round(total, 1), "done": done}
        write_json(self._path, self._parts)

    def missing(self, part: Part, parts: Mapping[str, Part]) -> list[str]:
        """Return the parts that this one needs and that are not done."""
        return [name for name in part.needs if not self.is_done(parts[name])]

    def _of(self, part: Part) -> dict[str, Any]:
        kept = self._parts.get(part.name, {})
        return kept if kept.get("command") == list(part.command) else {}
