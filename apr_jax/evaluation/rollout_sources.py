"""Where problems and policies come from: files and run folders. Light to import, so that mistakes are told at once."""

import json
import pathlib
from collections.abc import Sequence

from apr_jax.config import Config, ConfigError
from apr_jax.tasks.base import Split, split_size
from apr_jax.tasks.countdown.rules import Problem


class ProblemFileError(ConfigError):
    """A problem file that cannot be read. The message names the file and the line."""


def read_problems(path: str | pathlib.Path, limit: int | None = None) -> list[Problem]:
    """Problems from a JSONL file: `{"numbers": [3, 7, 12], "target": 40}` a line; other keys are ignored.

    Raises ProblemFileError, which names the line, for anything else, and for a file that is missing or has no problem.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemFileError(f"{path}: cannot be read: {error}") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            problems.append(_read_problem(line, f"{path}, line {number}"))
    if not problems:
        raise ProblemFileError(f"{path}: holds no problem")
    return problems if limit is None else problems[:limit]


def read_problem_words(words: Sequence[str]) -> Problem:
    """A problem from the words of a command line: the target, then the numbers. Raises ConfigError with an example."""
    example = "name the target and then the numbers: 27 22 26 31 53"
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise ConfigError(f"{word!r} is no whole number; {example}")
    if len(words) < 3:
        raise ConfigError(f"a problem is a target and at least two numbers, and here are {len(words)}; {example}")
    try:
        target, *numbers = map(int, words)
        return Problem(tuple(numbers), target)
    except ValueError as error:
        raise ConfigError(f"{error}; {example}") from error


def check_policy_folder(path: pathlib.Path, flag: str = "checkpoint") -> None:
    """Raises ConfigError unless there is a folder `path`, or `path` is "best" in one (`load_policy`)."""
    if not path.is_dir() and not (path.name == "best" and path.parent.is_dir()):
        raise ConfigError(f"--{flag}={path}: no such folder")


def newest_run(root: str | pathlib.Path) -> pathlib.Path:
    """The run folder below `root` whose checkpoints were written last. Raises FileNotFoundError where there is none."""
    folders = [checkpoints for checkpoints in pathlib.Path(root).glob("*/checkpoints") if any(checkpoints.iterdir())]
    if not folders:
        raise FileNotFoundError(f"no run with checkpoints in {root}/: train one first, or name a --checkpoint")
    return max(folders, key=_written).parent


def choose_split(config: Config, split: str | None, num_problems: int | None) -> tuple[Split, int]:
    """Which split's first problems, and how many: what was asked for, else `config.evaluation`'s.

    A split that was asked for without a number gives no more than it has: it may be smaller than the config's.
    """
    chosen: Split = split or config.evaluation.split  # type: ignore[assignment]  # a flag that lists the splits
    if num_problems is not None:
        return chosen, num_problems
    wanted = config.evaluation.num_problems
    return chosen, wanted if split is None else min(wanted, split_size(config.data, chosen))


def check_method_flag(method: str, temperature: float | None, budget: int | None) -> None:
    """`reasoning.programs.check_method` for --method: raises ConfigError."""
    from apr_jax.reasoning.programs import check_method  # slower to import than the rest here

    try:
        check_method(method, temperature, budget=budget)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def _read_problem(line: str, where: str) -> Problem:
    example = 'a line takes {"numbers": [3, 7, 12], "target": 40}'
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ProblemFileError(f"{where}: not JSON ({error}); {example}") from error
    if not isinstance(value, dict) or "numbers" not in value or "target" not in value:
        raise ProblemFileError(f"{where}: no object with numbers and target; {example}")
    if not isinstance(value["numbers"], list):
        raise ProblemFileError(f"{where}: numbers={value['numbers']!r} is not a list; {example}")
    try:
        return Problem(numbers=tuple(value["numbers"]), target=value["target"])
    except ValueError as error:
        raise ProblemFileError(f"{where}: {error}") from error


def _written(checkpoints: pathlib.Path) -> float:
    return max(path.stat().st_mtime for path in (checkpoints, *checkpoints.glob("*"), *checkpoints.glob("*/*")))
