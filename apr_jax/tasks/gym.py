"""Datasets of the package reasoning-gym (extra [gym]), each a task that its own scorer judges: `task.name=gym:NAME`.

A problem is a place: the dataset with its settings, and an index. The package makes the entry there when it is
asked for.
"""

import dataclasses
import functools
import importlib
import random
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from apr_jax.config import Config, ConfigError, check_choice, shown
from apr_jax.config_fields import Range, Seed
from apr_jax.files import parse_json
from apr_jax.tasks.base import Split, Task, Verdict
from apr_jax.tasks.text_dialect import TextForm, Work
from apr_jax.tasks.traces import TracedConfig, dialects_of, read_traces, text_field, whole_lines

_RESULT = "When you are done, write a line <result>, lines with the final answer alone, and a line </result>.\n"
_SPAWN = (
    "Parts of the work can be done at once: write a line <spawn>, for each part a line <thread N> (N counts from 1), "
    "what is to be done and a line </thread>, and at last a line </spawn>. Their results then take its place. "
)
_LARGEST = 1_000_000  # entries
_LONGEST = 10_000  # characters of an answer that is scored
# Some scorers evaluate an answer as Python: no private names, no towers of powers, no huge exponents, no factorials.
_HOSTILE = re.compile(r"__[a-z]|\*\*[^,;\n]*\*\*|\*\*\s*\(?\s*-?\d{4}|[\d)]!")


@dataclasses.dataclass(frozen=True)
class Place:
    """An entry of a dataset."""

    dataset: str
    index: int
    settings: str = ""
    dataset_seed: int = 0
    size: int = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class GymConfig(TracedConfig):
    """The section of a dataset. Without `traces`, demonstrations are answers alone."""

    dataset: str
    settings: str  # what the dataset's own configuration takes, as a JSON object; "": its defaults
    dataset_seed: Seed
    size: Annotated[int, Range(1, _LARGEST)]  # the dataset's entries, of which all splits are drawn

    def place(self, index: int) -> Place:
        """Return the place of an entry."""
        return Place(self.dataset, index, self.settings, self.dataset_seed, self.size)

    def problem_of(self, item: Mapping[str, Any]) -> Place:
        index = item.get("index")
        if type(index) is not int or not 0 <= index < self.size:
            raise ValueError(f"'index' must be that of an entry, below task.size={self.size}, and is {shown(index)}")
        problem = self.place(index)
        if text_field(item, "prompt").split() != question(problem).split():
            raise ValueError(f"'prompt' is not the question of entry {index} with this dataset, settings and seed")
        return problem


@functools.lru_cache(maxsize=8)
def _open(dataset: str, settings: str, seed: int, size: int) -> Any:
    """Make a dataset. Raises ConfigError where it is not there or refuses its settings."""
    try:
        package = importlib.import_module("reasoning_gym")
        known = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise ConfigError(
            f"task.dataset={shown(dataset)}: its package is not installed ({error}); "
            "pip install 'reasoning-gym>=0.1.20,<0.2', or this project with its extra [gym]"
        ) from error
    check_choice("task.dataset", dataset, sorted(known))
    try:
        values = parse_json(settings.encode()) if settings else {}
        if not isinstance(values, dict) or {"seed", "size"} & set(values):
            raise ValueError("it takes a JSON object without seed and size, which are task.dataset_seed and task.size")
        return package.create_dataset(dataset, **values, seed=seed, size=size)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ConfigError(
            f"task.settings={shown(settings)}: the dataset {dataset!r} of {size} entries cannot be made ({reason})"
        ) from error


@functools.lru_cache(maxsize=4_096)
def _entry(problem: Place) -> Mapping[str, Any]:
    """Return an entry. Raises ConfigError where there is none with a question and an answer in text."""
    dataset, name = _open(problem.dataset, problem.settings, problem.dataset_seed, problem.size), problem.dataset
    try:
        entry = dataset[problem.index]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ConfigError(f"task.dataset={name!r}: entry {problem.index} cannot be made ({reason})") from error
    for field in ("question", "answer"):
        if not isinstance(entry.get(field), str) or not entry[field].strip():
            value = shown(entry.get(field))
            raise ConfigError(
                f"task.dataset={name!r}: its entry {problem.index} has no {field} in text, but {value}; name another"
            )
    return entry


def question(problem: Place) -> str:
    """Return the question of an entry, in whole lines. Raises ConfigError where there is none."""
    try:
        return whole_lines(_entry(problem)["question"])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"task.dataset={problem.dataset!r}, entry {problem.index}: {error}") from error


class _GymForm(TextForm):
    def question(self, problem: Place) -> str:
        return question(problem)

    def work(self, problem: Place, rng: random.Random, section: Any) -> Work:
        return Work(question(problem), result=_entry(problem)["answer"].strip("\n") + "\n")


class Gym(Task):
    """Entries of a dataset. Only the scorer's full mark is right."""

    name = "gym"
    named_by = "dataset"
    section = GymConfig
    problem_fields = ("dataset", "settings", "dataset_seed", "size")
    dialects = dialects_of(_GymForm(), _RESULT, _SPAWN + _RESULT)
    example = "countdown 17"

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Place]:
        section = config.task
        assert isinstance(section, GymConfig)
        question(section.place(0))
        if split == "train" and section.traces:
            dialect = self.dialects.get(config.data.method, self.dialects["adaptive"])
            problems = tuple(read_traces(section, dialect))
            return lambda rng: rng.choice(problems)
        return lambda rng: section.place(rng.randrange(section.size))

    def verify(self, answer: str | None, problem: Place) -> Verdict:
        if answer is None:
            return Verdict(False, "no_answer")
        entry = _entry(problem)
        dataset = _open(problem.dataset, problem.settings, problem.dataset_seed, problem.size)
        if answer == entry["answer"].strip("\n"):
            return Verdict(True, "correct")
        if len(answer) > _LONGEST or _HOSTILE.search(answer):
            return Verdict(False, "not_scored")
        try:
            score = float(dataset.score_answer(answer, entry))
        except Exception:  # what a model wrote is data
            return Verdict(False, "not_scored")
        return Verdict(True, "correct") if score >= 1.0 - 1e-6 else Verdict(False, "wrong_answer")

    def key(self, problem: Place) -> str:
        return question(problem)

    def vote(self, answer: str | None) -> str | None:
        return None if answer is None else " ".join(answer.split())

    def describe(self, problem: Place) -> dict[str, Any]:
        return {"title": f"{problem.dataset} {problem.index}", **dataclasses.asdict(problem)}

    def read_problem(self, value: Any) -> Place:
        """Return the entry that an object of `describe` names, or `NAME INDEX` of a dataset as it is by default."""
        if isinstance(value, Place):
            return value
        if isinstance(value, str) and (match := re.fullmatch(r"(\w{1,64}) (\d{1,7})", value, re.ASCII)):
            value = {"dataset": match[1], "index": int(match[2])}
        if isinstance(value, dict):
            given = {field.name: value[field.name] for field in dataclasses.fields(Place) if field.name in value}
            types = {"dataset": str, "index": int, "settings": str, "dataset_seed": int, "size": int}
            if {"dataset", "index"} <= set(given) and all(type(v) is types[k] for k, v in given.items()):
                problem = Place(**given)
                if 0 <= problem.index < problem.size <= _LARGEST:
                    return problem
        raise ValueError(f"{shown(value)} names no entry of a dataset")


GYM = Gym()
