"""Splits of problems and their demonstrations: the same for a seed, whatever the number of worker processes.

Problem `index` of a split is drawn from `random.Random(f"{seed}/{split}/{index}")`, and its search from a generator of
its own (the same with `/search`), so that both methods demonstrate the same problems. The held-out splits are drawn
first and without repetition; a draw for train that hits one of them is drawn again from the same generator. Train may
repeat itself, as the reference's does.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, TypeVar

from apr_jax.config import ConfigError, DataConfig, TaskConfig
from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.demonstrations import demonstrate
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.trace import Demonstration

Split = Literal["train", "validation", "test", "test_unseen_targets"]
HELD_OUT_SPLITS: tuple[Split, ...] = ("validation", "test", "test_unseen_targets")
SPLITS: tuple[Split, ...] = ("train", *HELD_OUT_SPLITS)

_CHUNK_LEN = 64  # problems a worker takes at a time
_CHUNKS_AHEAD = 4  # chunks a worker that are under way before they are asked for
_MAX_REDRAWS = 1000

_Key = tuple[tuple[int, ...], int]
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Splits:
    """The problems of every split, each a function of its index alone."""

    task: TaskConfig
    seed: int
    seen_targets: tuple[int, ...]
    unseen_targets: tuple[int, ...]  # those of test_unseen_targets, which no other split has
    held_out: dict[Split, tuple[Problem, ...]]

    def problem(self, split: Split, index: int) -> Problem:
        """The split's problem at this index. Raises ConfigError if train has none outside of the held-out splits."""
        if split != "train":
            return self.held_out[split][index]
        return _draw_new(self.task, self.seed, split, index, self.seen_targets, self._held_out_keys)

    @functools.cached_property
    def _held_out_keys(self) -> frozenset[_Key]:
        return frozenset(problem.key for problems in self.held_out.values() for problem in problems)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How fast problems were sampled and searched by both methods, and what share each method solved."""

    problems: int
    seconds: float  # wall time, processes' start included
    problems_per_second_per_core: float  # by the workers' CPU time
    serial_accuracy: float
    parallel_accuracy: float


def split_size(data: DataConfig, split: Split) -> int:
    """The number of problems of a split."""
    sizes: dict[Split, int] = {
        "train": data.num_train,
        "validation": data.num_validation,
        "test": data.num_test,
        "test_unseen_targets": data.num_test_unseen_targets,
    }
    return sizes[split]


@functools.lru_cache(maxsize=4)
def draw_splits(task: TaskConfig, data: DataConfig, seed: int) -> Splits:
    """Sets targets aside and draws the held-out splits, no two of whose problems are the same.

    Raises:
      ConfigError: no target is left for the other splits, or a held-out split asks for more problems than there are.
    """
    targets = range(task.min_target, task.max_target + 1)
    if data.num_unseen_targets >= len(targets):
        raise ConfigError(
            f"data.num_unseen_targets={data.num_unseen_targets} leaves none of the {len(targets)} targets "
            f"{task.min_target}..{task.max_target} to train on"
        )
    unseen = tuple(sorted(random.Random(f"{seed}/unseen_targets").sample(targets, data.num_unseen_targets)))
    seen = tuple(target for target in targets if target not in unseen)
    held_out: dict[Split, tuple[Problem, ...]] = {}
    keys: set[_Key] = set()
    for split in HELD_OUT_SPLITS:
        problems = []
        for index in range(split_size(data, split)):
            split_targets = unseen if split == "test_unseen_targets" else seen
            problems.append(_draw_new(task, seed, split, index, split_targets, keys))
            keys.add(problems[-1].key)
        held_out[split] = tuple(problems)
    return Splits(task, seed, seen, unseen, held_out)


def generate_problems(task: TaskConfig, data: DataConfig, seed: int, split: Split) -> Iterator[Problem]:
    """A split's problems, in order. Raises ConfigError as `draw_splits` does."""
    splits = draw_splits(task, data, seed)
    return (splits.problem(split, index) for index in range(split_size(data, split)))


def generate_split(
    task: TaskConfig,
    data: DataConfig,
    seed: int,
    split: Split,
    count_tokens: Callable[[str], int] | None = None,
) -> Iterator[Demonstration]:
    """A split's demonstrations by `data.method`, in order, made by `data.num_workers` processes.

    With more than one worker, `__main__` must be importable without side effects, and `count_tokens` (needed for serial
    demonstrations conditioned on their budget) must pickle.

    Raises:
      ConfigError: the splits cannot be drawn (see `draw_splits`).
      ValueError: `count_tokens` is needed and missing.
    """
    draw_splits(task, data, seed)
    of_chunk = functools.partial(_demonstrate_chunk, task, data, seed, split, count_tokens)
    chunks = _map_chunks(of_chunk, split_size(data, split), data.num_workers)
    return itertools.chain.from_iterable(chunks)


def measure(
    task: TaskConfig,
    seed: int,
    num_problems: int,
    num_workers: int,
    on_problem: Callable[[Demonstration, Demonstration], None] | None = None,
) -> Measurement:
    """Samples problems and searches each by both methods.

    Args:
      task: what to sample and how to search.
      seed: of the problems.
      num_problems: how many.
      num_workers: processes.
      on_problem: called in order with each problem's serial and adaptive demonstration.
    """
    task = dataclasses.replace(task, context_windows=())  # what prompts name changes no search
    num_serial = num_parallel = 0
    core_seconds = 0.0
    start = time.perf_counter()
    for pairs, chunk_seconds in _map_chunks(functools.partial(_measure_chunk, task, seed), num_problems, num_workers):
        core_seconds += chunk_seconds
        for serial, adaptive in pairs:
            num_serial += serial.correct
            num_parallel += adaptive.correct
            if on_problem is not None:
                on_problem(serial, adaptive)
    return Measurement(
        problems=num_problems,
        seconds=time.perf_counter() - start,
        problems_per_second_per_core=num_problems / core_seconds,
        serial_accuracy=num_serial / num_problems,
        parallel_accuracy=num_parallel / num_problems,
    )


def _draw_new(
    task: TaskConfig, seed: int, split: Split, index: int, targets: Sequence[int], taken: Collection[_Key]
) -> Problem:
    rng = random.Random(f"{seed}/{split}/{index}")
    for _ in range(_MAX_REDRAWS):
        problem = rules.sample_problem(rng, task, targets)
        if problem.key not in taken:
            return problem
    raise ConfigError(
        f"problem {index} of split {split}: each of {_MAX_REDRAWS} draws is among the {len(taken)} held-out problems "
        "drawn before; widen the task's numbers and targets, or make those splits smaller"
    )


def _demonstrate_chunk(
    task: TaskConfig,
    data: DataConfig,
    seed: int,
    split: Split,
    count_tokens: Callable[[str], int] | None,
    indices: range,
) -> list[Demonstration]:
    splits = draw_splits(task, data, seed)
    demonstrations = []
    for index in indices:
        rng = random.Random(f"{seed}/{split}/{index}/search")
        problem = splits.problem(split, index)
        demonstrations.append(demonstrate(problem, rng, task, data.method, data.condition_on_budget, count_tokens))
    return demonstrations


def _measure_chunk(
    task: TaskConfig, seed: int, indices: range
) -> tuple[list[tuple[Demonstration, Demonstration]], float]:
    start = time.process_time()
    pairs = []
    for index in indices:
        rng = random.Random(f"{seed}/measure/{index}")
        problem = rules.sample_problem(rng, task)
        serial = demonstrate(problem, rng, task, "serial", condition_on_budget=False)
        pairs.append((serial, demonstrate(problem, rng, task, "adaptive", condition_on_budget=False)))
    return pairs, time.process_time() - start


def _map_chunks(function: Callable[[range], _T], num_problems: int, num_workers: int) -> Iterator[_T]:
    """Applies `function` to consecutive chunks of indices, in order, keeping a bounded number of chunks under way."""
    chunks = (range(i, min(i + _CHUNK_LEN, num_problems)) for i in range(0, num_problems, _CHUNK_LEN))
    if num_workers == 1:
        yield from map(function, chunks)
        return
    # Spawned, not forked: the caller may have started JAX, whose threads a fork would cut off.
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context)
    try:
        ahead = itertools.islice(chunks, num_workers * _CHUNKS_AHEAD)
        under_way = deque(executor.submit(function, chunk) for chunk in ahead)
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(executor.submit(function, chunk) for chunk in itertools.islice(chunks, 1))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)
