"""Problems and policies from files and run folders. Light to import, so that mistakes are told at once."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from apr_jax.checkpoints.identity import find_policy, refuse_msgpack, with_auto
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.files import FileError, parse_json
from apr_jax.paths import RUNS, local_path, path_of
from apr_jax.policies import DEFAULT, policy_path
from apr_jax.reasoning.programs import check_method
from apr_jax.tasks import TASKS, task_of
from apr_jax.tasks.base import Split, Task, split_size


class ProblemFileError(ConfigError):
    """A problem file that cannot be read. The message names the file and the line."""


def read_problems(task: Task, path: str | pathlib.Path, limit: int | None = None) -> list[Any]:
    """Read problems, each as `task.read_problem` takes it, from JSON lines or one JSON list; other keys are ignored.

    Raises ProblemFileError, which names the line or the item, for anything else, and for a file that is missing or has
    no problem.
    """
    path = path_of(path)
    try:
        text = path.read_bytes()
        is_list = text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        items = parse_json(text) if is_list else text.split(b"\n")
    except (OSError, ValueError) as error:
        raise ProblemFileError(f"{path}: cannot be read: {error}") from error
    problems = []
    for number, item in enumerate(items, start=1):
        if is_list:
            problems.append(_read_problem(task, item, f"{path}, item {number}"))
        elif item.strip():
            problems.append(_read_problem(task, item, f"{path}, line {number}"))
    if not problems:
        raise ProblemFileError(f"{path}: holds no problem")
    return problems if limit is None else problems[:limit]


def read_problem_words(task: Task, words: Sequence[str]) -> Any:
    """Read a problem from the words of a command line. Raises ConfigError with an example."""
    try:
        return task.read_words(words)
    except ValueError as error:
        raise ConfigError(f"{error}; a problem of {task.name} is written as {task.example}") from error


def policy_task(folder: pathlib.Path | None, config: Config, *, is_given: bool) -> Task:
    """Return the task that the policy in `folder` was trained for, without loading it.

    A policy without a configuration of its own, or in whose place one `is_given`, has `config`'s task.
    """
    if folder is not None and not is_given:
        with contextlib.suppress(OSError, FileError, ConfigError, LookupError, TypeError):  # loading it will say more
            saved = find_policy(folder if folder.is_dir() else folder.parent).config
            if saved is not None:
                return TASKS[saved["task"]["name"]]
    return task_of(config)


def define_checkpoint() -> flags.FlagHolder[str | None]:
    """Define --checkpoint of the programs that use a policy, which `policy_folder` finds."""
    return flags.DEFINE_string(
        "checkpoint",
        None,
        "Run (or RUN/best), checkpoint or Hugging Face folder, FILE.gguf, or the name of a policy that comes along "
        f"[newest in {RUNS}/, or {DEFAULT.name}].",
    )


def choose_policy(given: str | None, values: Mapping[str, Any]) -> tuple[pathlib.Path, Config]:
    """Return a policy as `policy_folder` does, and a configuration whose auto fields are its own.

    Args:
      values: of the configuration.
    Raises: ConfigError for values that cannot work, and as `policy_folder`.
    """
    folder = policy_folder(given)
    return folder, from_config_dict(with_auto(dict(values), folder))


def policy_folder(given: str | None) -> pathlib.Path:
    """Return the policy that was `given`, else the newest run, and before there is one, the first that is shipped.

    Raises: ConfigError as `given_policy`.
    """
    if given:
        return given_policy(given)
    if (newest := newest_run(RUNS)) is not None:
        return newest
    print(f"No run in {RUNS}/: this is the policy {DEFAULT.name}, which comes with apr_jax.", file=sys.stderr)
    return DEFAULT


def given_policy(given: str, flag: str = "checkpoint") -> pathlib.Path:
    """Return the policy that a flag names (`policies.policy_path`): a folder, a GGUF file, or "best" in a folder.

    Raises ConfigError where there is none, and for one whose weights are msgpack.
    """
    path = policy_path(given)
    refuse_msgpack(path)
    if path.suffix == ".gguf" and path.exists():
        return local_path(path, "a GGUF file")
    if not path.is_dir() and not (path.name == "best" and path.parent.is_dir()):
        raise ConfigError(f"--{flag}={path}: no such folder" + (" or file" if path.suffix == ".gguf" else ""))
    return path


def newest_run(root: str | pathlib.Path) -> pathlib.Path | None:
    """Return the run folder below `root` whose checkpoints were written last; None where there is no run."""
    folders = [checkpoints for checkpoints in pathlib.Path(root).glob("*/checkpoints") if any(checkpoints.iterdir())]
    return max(folders, key=_written).parent if folders else None


def choose_split(config: Config, split: str | None, num_problems: int | None) -> tuple[Split, int]:
    """Return the split to take problems from, and how many: as asked for, else as in `config.evaluation`.

    A split that was asked for without a number gives no more than it has: it may be smaller than the config's.
    """
    chosen: Split = split or config.evaluation.split  # type: ignore[assignment]  # a flag that lists the splits
    if num_problems is not None:
        return chosen, num_problems
    wanted = config.evaluation.num_problems
    return chosen, wanted if split is None else min(wanted, split_size(config.data, chosen))


def check_method_flag(method: str, task: Task, temperature: float | None, budget: int | None) -> None:
    """Check --method, as `reasoning.programs.check_method`. Raises ConfigError."""
    try:
        check_method(method, task, temperature, budget=budget)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


def _read_problem(task: Task, item: Any, where: str) -> Any:
    """Read a problem from a JSON value, or from the bytes of a line."""
    example = f"a line takes {json.dumps(task.describe(task.read_words(task.example.split())))}"
    try:
        return task.read_problem(parse_json(item) if isinstance(item, bytes) else item)
    except ValueError as error:
        raise ProblemFileError(f"{where}: {error}; {example}") from error


def _written(checkpoints: pathlib.Path) -> float:
    return max(path.stat().st_mtime for path in (checkpoints, *checkpoints.glob("*"), *checkpoints.glob("*/*")))
