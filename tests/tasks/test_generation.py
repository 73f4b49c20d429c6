import dataclasses
from collections import Counter
from typing import Any

import pytest

from apr_jax.config import Config, ConfigError
from apr_jax.tasks import generation
from apr_jax.tasks.base import SPLITS, Call, Demonstration, Split
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.generation import generate_problems, generate_split
from tests import configs
from tests.tasks.settings import LAPTOP, REFERENCE, SMALL_DATA

TWO_WORKERS = dataclasses.replace(SMALL_DATA, num_workers=2)
SERIAL = dataclasses.replace(SMALL_DATA, method="serial")


def config(task: Any = LAPTOP, data: Any = SMALL_DATA, seed: int = 0) -> Config:
    return dataclasses.replace(configs.LAPTOP, task=task, data=data, seed=seed)


def _problems(seed: int = 0, task: Any = LAPTOP, data: Any = SMALL_DATA) -> dict[Split, list[Problem]]:
    return {split: list(generate_problems(config(task, data, seed), split)) for split in SPLITS}


def test_splits_have_their_sizes() -> None:
    sizes = {split: len(problems) for split, problems in _problems().items()}
    assert sizes == {"train": 200, "validation": 40, "test": 60, "test_unseen_targets": 30}


def test_the_number_of_workers_changes_nothing() -> None:
    """Also the order, also when chunks of several workers end unevenly."""
    alone = list(generate_split(config(LAPTOP, SMALL_DATA, 7), "train"))
    assert alone == list(generate_split(config(LAPTOP, TWO_WORKERS, 7), "train"))
    assert len(alone) == 200


def test_workers_count_tokens_too() -> None:
    serial = dataclasses.replace(TWO_WORKERS, method="serial", num_train=70)
    demonstrations = list(generate_split(config(LAPTOP, serial, 7), "train", count_tokens=len))
    assert all(demonstration.calls[0].context.startswith("Token Budget: ") for demonstration in demonstrations)
    alone = dataclasses.replace(serial, num_workers=1)
    assert demonstrations == list(generate_split(config(LAPTOP, alone, 7), "train", count_tokens=len))


def _threads(demonstration: Demonstration) -> list[tuple[Call, ...]]:
    """Return the calls of each thread. Those of a thread are the one that begins it, and those that go on with it."""
    threads: list[tuple[Call, ...]] = []
    for call in demonstration.calls:
        before = [thread for thread in threads if thread[-1].depth == call.depth]
        if before and before[-1][-1].ends_in_spawn:
            threads[threads.index(before[-1])] += (call,)
        else:
            threads.append((call,))
    return threads


def _child_of_root(thread: tuple[Call, ...]) -> str:
    """Return the node of the root's child that a thread is, or is below."""
    return ",".join((trace.thread_node(thread[0].context) or "").split(",")[:2])


def _has_replay(thread: tuple[Call, ...]) -> bool:
    return thread[-1].replay_start < len(thread[-1].completion)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_share_of_the_children_is_kept_and_parents_and_answers_stay(levels: int) -> None:
    task = dataclasses.replace(LAPTOP, num_numbers=4, spawn_depth=levels)
    rollout = dataclasses.replace(configs.LAPTOP.rollout, max_depth=levels)
    shares = [dataclasses.replace(SMALL_DATA, children_share=share) for share in (1.0, 0.3, 0.0)]
    settings = [dataclasses.replace(configs.LAPTOP, task=task, data=data, rollout=rollout) for data in shares]
    whole, thin, none = (list(generate_split(setting, "train")) for setting in settings)
    children = kept = 0
    for all_of_it, some_of_it, parent in zip(whole, thin, none, strict=True):
        answers = [thread for thread in _threads(all_of_it)[1:] if _has_replay(thread)]
        if levels == 1:
            assert _threads(parent)[1:] == answers
        (root, *threads), (same_root, *fewer) = _threads(all_of_it), _threads(some_of_it)
        assert root == same_root
        assert all(thread in threads for thread in fewer)
        below = Counter(_child_of_root(thread) for thread in fewer)
        assert below.items() <= Counter(_child_of_root(thread) for thread in threads).items()  # with all that is below
        children += sum(thread[0].depth == 1 and not _has_replay(thread) for thread in threads)
        kept += sum(thread[0].depth == 1 and not _has_replay(thread) for thread in fewer)
        assert (some_of_it.answer, some_of_it.correct) == (all_of_it.answer, all_of_it.correct)
    assert children > 300
    assert abs(kept / children - 0.3) < 0.08


def test_a_reader_may_stop_early() -> None:
    demonstrations = iter(generate_split(config(LAPTOP, TWO_WORKERS, 7), "train"))
    assert next(demonstrations).method == "adaptive"
    del demonstrations


def test_a_problem_depends_on_its_seed_split_and_index_alone() -> None:
    longer = dataclasses.replace(SMALL_DATA, num_train=400)
    assert _problems(data=longer)["train"][:200] == _problems()["train"]
    assert _problems(seed=1)["train"] != _problems()["train"]
    assert _problems()["validation"] != _problems()["test"][:40]


def test_both_methods_demonstrate_the_same_problems() -> None:
    problems = list(generate_problems(config(LAPTOP, SMALL_DATA, 3), "test"))
    adaptive = list(generate_split(config(LAPTOP, SMALL_DATA, 3), "test"))
    serial = list(generate_split(config(LAPTOP, SERIAL, 3), "test", count_tokens=len))
    assert problems == [demonstration.problem for demonstration in adaptive]
    assert problems == [demonstration.problem for demonstration in serial]


@pytest.mark.parametrize("task", [LAPTOP, REFERENCE], ids=["small", "full"])
def test_no_two_splits_share_a_problem(task: Any) -> None:
    keys = {split: [problem.key for problem in problems] for split, problems in _problems(task=task).items()}
    for split in SPLITS[1:]:
        assert len(set(keys[split])) == len(keys[split])
        for other in SPLITS:
            assert other == split or not set(keys[split]) & set(keys[other])


def test_train_leaves_out_held_out_problems_even_where_there_are_few() -> None:
    """Two numbers below 6: most draws are held out, so train must have drawn again."""
    few = dataclasses.replace(LAPTOP, num_numbers=2, max_number=5, min_target=3, max_target=10, num_unseen_targets=1)
    data = dataclasses.replace(SMALL_DATA, num_validation=8, num_test=4, num_test_unseen_targets=2)
    keys = {split: {problem.key for problem in problems} for split, problems in _problems(task=few, data=data).items()}
    assert not keys["train"] & (keys["validation"] | keys["test"] | keys["test_unseen_targets"])
    assert len(keys["validation"]) == 8
    assert len(keys["train"]) > 1


def test_unseen_targets_are_only_in_their_split() -> None:
    targets = {split: {problem.target for problem in problems} for split, problems in _problems().items()}
    assert len(targets["test_unseen_targets"]) == LAPTOP.num_unseen_targets
    assert not targets["test_unseen_targets"] & (targets["train"] | targets["validation"] | targets["test"])
    assert {problem.target for problem in _problems(seed=1)["test_unseen_targets"]} != targets["test_unseen_targets"]


def test_conditioning_on_the_budget_is_the_datas_choice() -> None:
    plain = dataclasses.replace(SMALL_DATA, condition_on_budget=False)
    (first, *_) = generate_split(config(LAPTOP, plain, 0), "test")
    (conditioned, *_) = generate_split(config(LAPTOP, SMALL_DATA, 0), "test")
    assert first.calls[0].context == conditioned.calls[0].context.split(" ", 4)[4]


def test_too_many_unseen_targets_are_refused() -> None:
    task = dataclasses.replace(LAPTOP, num_unseen_targets=31)
    with pytest.raises(ConfigError, match=r"num_unseen_targets=31 leaves none of the 31 targets 10\.\.40"):
        generate_split(config(task), "train")


def test_held_out_splits_larger_than_the_task_are_refused() -> None:
    few = dataclasses.replace(LAPTOP, num_numbers=2, max_number=3, min_target=2, max_target=9)
    with pytest.raises(ConfigError, match="of split validation: each of 1000 draws"):
        generate_split(config(few, SMALL_DATA, 0), "validation")


def test_a_serial_budget_without_a_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="count_tokens"):
        list(generate_split(config(LAPTOP, SERIAL, 0), "test"))


def test_measuring_searches_every_problem_both_ways() -> None:
    seen = []
    methods = ("serial", "adaptive")
    measurement = generation.measure(config(), 130, methods, on_problem=seen.append)
    assert len(seen) == measurement.problems == 130
    assert all(serial.problem == adaptive.problem for serial, adaptive in seen)
    assert {(serial.method, adaptive.method) for serial, adaptive in seen} == {("serial", "adaptive")}
    assert measurement.accuracy["serial"] == sum(serial.correct for serial, _ in seen) / 130
    assert measurement.accuracy["adaptive"] == sum(adaptive.correct for _, adaptive in seen) / 130
    assert measurement.problems_per_second_per_core > 88
    assert generation.measure(config(data=TWO_WORKERS), 130, methods).accuracy == measurement.accuracy
