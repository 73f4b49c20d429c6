"""Splits of problems and their demonstrations: the same for a seed, whatever the number of worker processes.

Problem `index` of a split is drawn from `random.Random(f"{seed}/{split}/{index}")`, and its search from a generator of
its own (the same with `/search`), so that all methods demonstrate the same problems. The held-out splits are drawn
first and without repetition; a draw for train that hits one of them is drawn again from the same generator. Train may
repeat itself, as the reference's does.
"""

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from apr_jax.config import Config, ConfigError, TaskConfig
from apr_jax.tasks import TASKS, task_of
from apr_jax.tasks.base import HELD_OUT_SPLITS, Call, CountTokens, Demonstration, Split, Task, split_size
from apr_jax.tasks.dialect import Dialect
from apr_jax.tasks.workers import map_in_processes

_CHUNK_LEN = 64  # problems a worker takes at a time
_MAX_REDRAWS = 1000

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Splits:
    """The problems of every split, each a function of its index alone."""

    task: Task
    config: Config
    held_out: dict[Split, tuple[Any, ...]]

    def problem(self, split: Split, index: int) -> Any:
        """Return the split's problem at this index. Raises ConfigError if train has none outside of held-out splits."""
        if split != "train":
            return self.held_out[split][index]
        return _draw_new(self.task, self._sample_train, self.config.seed, split, index, self._held_out_keys)

    @functools.cached_property
    def _sample_train(self) -> Callable[[random.Random], Any]:
        return self.task.sampler(self.config, "train")

    @functools.cached_property
    def _held_out_keys(self) -> frozenset[Hashable]:
        return frozenset(self.task.key(problem) for problems in self.held_out.values() for problem in problems)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The speed at which problems were sampled and demonstrated, and the share that each method solved."""

    problems: int
    seconds: float  # wall time, processes' start included
    problems_per_second_per_core: float  # by the workers' CPU time
    accuracy: Mapping[str, float]  # by method


@functools.lru_cache(maxsize=4)
def draw_splits(config: Config) -> Splits:
    """Draw the held-out splits, no two of whose problems are the same.

    Raises ConfigError where a held-out split asks for more problems than there are, and as `Task.sampler`.
    """
    task = task_of(config)
    held_out: dict[Split, tuple[Any, ...]] = {}
    keys: set[Hashable] = set()
    for split in HELD_OUT_SPLITS:
        sample, problems = task.sampler(config, split), []
        for index in range(split_size(config.data, split)):
            problems.append(_draw_new(task, sample, config.seed, split, index, keys))
            keys.add(task.key(problems[-1]))
        held_out[split] = tuple(problems)
    return Splits(task, config, held_out)


def demonstrate(
    problem: Any,
    rng: random.Random,
    section: TaskConfig,
    method: str,
    condition_on_budget: bool,
    count_tokens: CountTokens | None = None,
) -> Demonstration:
    """Return how threads of a way of reasoning solve a problem. Arguments as of `Dialect.demonstrate`.

    Raises TaskLacksError for a method that the task has no dialect for, and ValueError where `count_tokens` is needed
    and missing, and for a budget that prompts cannot name.
    """
    task = TASKS[section.name]
    dialect = task.dialect(method, Dialect)
    if condition_on_budget and not dialect.names_budget:
        raise ValueError(f"prompts of {method!r} name no budget: set data.condition_on_budget=False")
    if count_tokens is None and dialect.counts_tokens(section, budget=condition_on_budget):
        raise ValueError(f"demonstrations of {method!r} depend on how many tokens they are: pass count_tokens")
    calls = dialect.demonstrate(problem, rng, section, count_tokens or len, budget=condition_on_budget)
    answer = dialect.demonstrated_answer(problem, calls)
    return Demonstration(problem, method, calls, answer, task.verify(answer, problem).correct)


def generate_problems(config: Config, split: Split) -> Iterator[Any]:
    """Yield a split's problems, in order. Raises ConfigError as `draw_splits` does."""
    splits = draw_splits(config)
    return (splits.problem(split, index) for index in range(split_size(config.data, split)))


def generate_split(config: Config, split: Split, count_tokens: CountTokens | None = None) -> Iterator[Demonstration]:
    """Yield a split's demonstrations by `data.method`, in order, made by `data.num_workers` processes.

    With more than one worker, `__main__` must be importable without side effects, and `count_tokens` (needed where
    `Dialect.counts_tokens` says so) must pickle.

    Raises:
      ConfigError: the splits cannot be drawn (see `draw_splits`).
      ValueError: `count_tokens` is needed and missing.
      ChildProcessError: a worker died.
    """
    return itertools.chain.from_iterable(map_split(_as_they_are, config, split, count_tokens))


def demonstrate_again(
    config: Config, split: Split, index: int, count_tokens: CountTokens | None = None
) -> Demonstration:
    """Return the split's demonstration at this index, alone. Arguments and errors as of `generate_split`."""
    (demonstration,) = _demonstrate_chunk(config, split, count_tokens, range(index, index + 1))
    return demonstration


def map_split(
    function: Callable[[int, list[Demonstration]], _T], config: Config, split: Split, count_tokens: CountTokens | None
) -> Iterator[_T]:
    """Yield `function(index of the first, demonstrations)` of some of a split's demonstrations at a time, in order.

    It is computed where they are made, so with several workers it and its result must pickle. Raises as
    `generate_split` does.
    """
    draw_splits(config)
    of_chunk = functools.partial(_map_chunk, function, config, split, count_tokens)
    return _map_chunks(of_chunk, split_size(config.data, split), config.data.num_workers)


def measure(
    config: Config,
    num_problems: int,
    methods: Sequence[str],
    count_tokens: CountTokens | None = None,
    on_problem: Callable[[Sequence[Demonstration]], None] | None = None,
) -> Measurement:
    """Sample problems and demonstrate each by all of `methods`, in `data.num_workers` processes.

    `on_problem` is called in order with each problem's demonstrations, in the order of the methods.
    """
    num_solved = dict.fromkeys(methods, 0)
    core_seconds = 0.0
    start = time.perf_counter()
    of_chunk = functools.partial(_measure_chunk, config, tuple(methods), count_tokens)
    for chunk, chunk_seconds in _map_chunks(of_chunk, num_problems, config.data.num_workers):
        core_seconds += chunk_seconds
        for demonstrations in chunk:
            for demonstration in demonstrations:
                num_solved[demonstration.method] += demonstration.correct
            if on_problem is not None:
                on_problem(demonstrations)
    return Measurement(
        problems=num_problems,
        seconds=time.perf_counter() - start,
        problems_per_second_per_core=num_problems / core_seconds,
        accuracy={method: solved / num_problems for method, solved in num_solved.items()},
    )


def _draw_new(
    task: Task,
    sample: Callable[[random.Random], Any],
    seed: int,
    split: Split,
    index: int,
    taken: Collection[Hashable],
) -> Any:
    rng = random.Random(f"{seed}/{split}/{index}")
    for _ in range(_MAX_REDRAWS):
        problem = sample(rng)
        if task.key(problem) not in taken:
            return problem
    raise ConfigError(
        f"problem {index} of split {split}: each of {_MAX_REDRAWS} draws is among the {len(taken)} held-out problems "
        "drawn before; let the section `task` allow more problems, or make those splits smaller"
    )


def _as_they_are(_: int, demonstrations: list[Demonstration]) -> list[Demonstration]:
    return demonstrations


def _map_chunk(
    function: Callable[[int, list[Demonstration]], _T],
    config: Config,
    split: Split,
    count_tokens: CountTokens | None,
    indices: range,
) -> _T:
    return function(indices.start, _demonstrate_chunk(config, split, count_tokens, indices))


def _demonstrate_chunk(
    config: Config, split: Split, count_tokens: CountTokens | None, indices: range
) -> list[Demonstration]:
    splits, data, demonstrations = draw_splits(config), config.data, []
    for index in indices:
        rng = random.Random(f"{config.seed}/{split}/{index}/search")
        problem = splits.problem(split, index)
        whole = demonstrate(problem, rng, config.task, data.method, data.condition_on_budget, count_tokens)
        rng = random.Random(f"{config.seed}/{split}/{index}/children")
        demonstrations.append(dataclasses.replace(whole, calls=_thinned(whole.calls, data.children_share, rng)))
    return demonstrations


def _thinned(calls: tuple[Call, ...], share: float, rng: random.Random) -> tuple[Call, ...]:
    """Return the calls of the root, of its children that replay an answer, which are few, and of a share of the others.

    A child is kept or left out with all that is below it: most of what a winning child spawns finds nothing, too, and
    threads that mostly saw answers claim some.
    """
    kept: list[Call] = []
    is_kept, goes_on = True, False  # the latest child of the root, after a spawn
    for index, call in enumerate(calls):
        if call.depth == 1:
            if not goes_on:
                is_kept = rng.random() < share or _has_replay(calls[index:])
            goes_on = call.ends_in_spawn
        if call.depth == 0 or is_kept:
            kept.append(call)
    return tuple(kept)


def _has_replay(calls: Sequence[Call]) -> bool:
    """Tell whether the thread that the first call begins ends in the replay of a winning path."""
    last = next(call for call in calls if call.depth == calls[0].depth and not call.ends_in_spawn)
    return last.replay_start < len(last.completion)


def _measure_chunk(
    config: Config, methods: Sequence[str], count_tokens: CountTokens | None, indices: range
) -> tuple[list[list[Demonstration]], float]:
    start, task = time.process_time(), task_of(config)
    sample = task.sampler(config, None)
    measured = []
    for index in indices:
        rng = random.Random(f"{config.seed}/measure/{index}")
        problem = sample(rng)
        measured.append([demonstrate(problem, rng, config.task, m, False, count_tokens) for m in methods])
    return measured, time.process_time() - start


def _map_chunks(function: Callable[[range], _T], num_problems: int, num_workers: int) -> Iterator[_T]:
    """Apply `function` to consecutive chunks of indices, in order."""
    chunks = (range(i, min(i + _CHUNK_LEN, num_problems)) for i in range(0, num_problems, _CHUNK_LEN))
    return map_in_processes(function, chunks, num_workers)
