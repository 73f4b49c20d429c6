"""Policies that come with the package: Hugging Face folders with cards, as launch/export.py writes them.

countdown4                four numbers of 1..99 to a target, the paper's problems, after SFT
countdown4_first_success  the same, where the first child that wins ends the others
countdown4_rl             that after GRPO, with free spawns
countdown4_serial         the same by serial search
laptop                    three numbers of 1..20 to a target, after GRPO
multiplication            products of 5 to 8 integers, after SFT
multiplication_serial     the same in one thread
"""

import os
import pathlib

from apr_jax.paths import path_of

_NAMES = (
    "countdown4",
    "countdown4_first_success",
    "countdown4_rl",
    "countdown4_serial",
    "laptop",
    "multiplication",
    "multiplication_serial",
)

SHIPPED = {name: pathlib.Path(__file__).parent / name for name in _NAMES}
DEFAULT = SHIPPED["countdown4"]  # where no policy is named


def policy_path(given: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path that a user names: a shipped policy's for its name, unless there is such a path."""
    path = path_of(given)
    return path if path.exists() else SHIPPED.get(os.fspath(given), path)
