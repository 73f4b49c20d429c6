"""Datasets of reasoning-gym: against a stand-in for the package, and against the package where it is installed."""

import dataclasses
import json
import random
import sys
import types

import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.tasks import TASKS, gym
from apr_jax.tasks.generation import demonstrate, draw_splits
from apr_jax.tasks.traces import TracedDialect, read_traces
from configs import gym as gym_config

GYM = TASKS["gym"]


class Dataset:
    """Sums of two numbers, or entries without an answer."""

    def __init__(self, name, seed, size, largest=99):
        assert largest > 0, "largest must be above 0"
        self._name, self._seed, self._size, self._largest = name, seed, size, largest

    def __getitem__(self, index):
        rng = random.Random(f"{self._seed}/{index}")
        a, b = rng.randint(0, self._largest), rng.randint(0, self._largest)
        return {"question": f"What is {a}+{b}?", "answer": None if self._name == "open" else str(a + b), "metadata": {}}

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01


@pytest.fixture
def package(monkeypatch):
    known = dict.fromkeys(("countdown", "products", "open"))
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=Dataset))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", types.SimpleNamespace(DATASETS=known))
    forget()
    yield
    forget()


def forget():
    gym._open.cache_clear()
    gym._entry.cache_clear()


def config_of(dataset="products", method="adaptive", **task):
    config = gym_config.get_config()
    config.model.family = "llama"
    config.task.update(name=f"gym:{dataset}", **task)
    config.data.update(method=method, num_train=30, num_validation=9, num_test=9, num_test_unseen_targets=9)
    config.evaluation.num_problems = config.grpo.validation_problems = 9
    return from_config_dict(config)


def check_dataset(config):
    """Check that splits are disjoint and the same again, and that the dataset's own answers are right."""
    splits = draw_splits(config)
    problems = [problem for each in splits.held_out.values() for problem in each]
    assert len(set(map(GYM.key, problems))) == 27
    for problem in [*problems, *(splits.problem("train", index) for index in range(9))]:
        for method in ("adaptive", "direct", "serial"):
            assert demonstrate(problem, random.Random(0), config.task, method, False).correct
        assert GYM.verify("no number", problem).reason in ("not_scored", "wrong_answer")
        assert GYM.read_problem(problem) == problem
        assert GYM.read_problem(json.loads(json.dumps(GYM.describe(problem)))) == problem
    draw_splits.cache_clear()
    forget()
    assert draw_splits(config) == splits


def test_a_dataset(package):
    config = config_of()
    assert (config.task.name, config.task.dataset) == ("gym", "products")
    check_dataset(config)
    problem = GYM.read_problem("products 17")
    entry = Dataset("products", 0, 10_000)[17]
    dialect = GYM.dialect("adaptive", TracedDialect)
    assert dialect.prompt(problem, 3).startswith(f"At most 3 threads.\n{entry['question']}\nParts of the work")
    assert dialect.read_ending(dialect.prompt(problem) + "<result>\n5\n</result>").answer == "5"
    assert GYM.verify(f"0{entry['answer']}", problem).correct  # the scorer takes it
    assert GYM.verify("1" * 10_001, problem).reason == "not_scored"
    for hostile in ("__import__('os')", "9**9**9", "2**99999", "9!"):
        assert GYM.verify(hostile, problem).reason == "not_scored"


def test_traces_of_a_dataset(package, tmp_path):
    question = Dataset("products", 0, 100_000)[17]["question"]
    line = {"index": 17, "prompt": question, "calls": ["I think\n<result>\n1\n</result>\n"]}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(line))
    config = config_of(traces=str(path))
    problem = draw_splits(config).problem("train", 0)
    assert problem.index == 17
    shown = demonstrate(problem, random.Random(0), config.task, "adaptive", True)
    assert (shown.calls[0].completion, shown.answer, shown.correct) == (line["calls"][0], "1", False)
    assert shown.calls[0].context.startswith("At most 0 threads.\n")
    for other in ({"index": 18}, {"index": -1}, {"index": "17"}, {"prompt": "What?"}):
        path.write_text(json.dumps(line | other))
        read_traces.cache_clear()
        with pytest.raises(ConfigError, match=r"line 1: '(index|prompt)'"):
            config_of(traces=str(path))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"dataset": "product"}, "did you mean 'products'"),
        ({"dataset": "open"}, "no answer in text, but None"),
        ({"settings": "[]"}, "takes a JSON object"),
        ({"settings": "{"}, "not JSON"),
        ({"settings": '{"seed": 1}'}, "task.dataset_seed"),
        ({"settings": '{"largest": 0}'}, "largest must be above 0"),
        ({"settings": '{"nothing": 0}'}, "TypeError"),
        ({"settings": '{"largest": 1}'}, "allow more problems"),
        ({"size": 0}, "task.size"),
    ],
)
def test_what_cannot_be_is_named(package, task, said):
    with pytest.raises(ConfigError) as error:
        draw_splits(config_of(**task))
    assert said in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    forget()
    with pytest.raises(ConfigError, match=r"'products': its package is not installed .*pip install"):
        config_of()


@pytest.mark.parametrize("dataset", ["countdown", "products", "prime_factorization"])
def test_the_package(dataset):
    pytest.importorskip("reasoning_gym", reason="the extra [gym]")
    forget()
    config = config_of(dataset)
    check_dataset(config)
    changed = dataclasses.replace(config.task, settings="{}", dataset_seed=5)
    assert GYM.key(changed.place(3)) == GYM.key(changed.place(3)) != GYM.key(config.task.place(3))
    with pytest.raises(ConfigError, match="no answer in text"):
        config_of("graph_color")
