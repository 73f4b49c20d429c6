"""The names of a run's phases, in their order, and the steps that they have checkpoints of."""

import pathlib
from typing import Literal

from apr_jax.paths import is_remote

COMMITTED = "commit_success.txt"  # the object that makes a folder of a store a whole checkpoint (Orbax writes it last)
PhaseName = Literal["sft", "grpo"]
PHASES: tuple[PhaseName, ...] = ("sft", "grpo")


def steps_in(folder: pathlib.Path) -> list[int]:
    """Return the steps of the checkpoints in a phase's folder, damaged ones too."""
    there = [child for child in folder.iterdir() if child.name.isdecimal()] if folder.is_dir() else []
    return [int(child.name) for child in there if not is_remote(child) or (child / COMMITTED).exists()]


def saved_steps(workdir: pathlib.Path) -> dict[PhaseName, int]:
    """Return the last step of each phase that a run folder has a checkpoint of, 0 without one."""
    return {phase: max(steps_in(workdir / "checkpoints" / phase), default=0) for phase in PHASES}
