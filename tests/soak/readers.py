"""Mutated traces through every reader: none raises, and none takes a wrong answer for a right one."""

import collections
import pathlib
import random
import re
import time
from fractions import Fraction
from typing import Any

from apr_jax.config import Config
from apr_jax.config_dict import from_config_dict
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Task
from apr_jax.tasks.dialect import (
    ChildResult,
    Dialect,
    PromiseDialect,
    SpawnCall,
    SpawnDialect,
    SpelledSpawnDialect,
    ThoughtDialect,
    ThreadDialect,
)
from configs import grpo, multiplication, nested_sums, reference, traces

TRACES = 1_000_000  # in 15 minutes
CHARACTERS = "0123456789+-*/=,:#<>[]'() \n\t\r.eE_\x00\u2028\u00b2\u0663\ufeff\U0001f600"


def drill(folder: pathlib.Path, share: float, seed: int) -> str:
    """Reads a share of the traces. Raises AssertionError for the first that a reader does not survive."""
    total, rng = max(1, int(TRACES * share)), random.Random(seed)
    configs = [grpo.get_config("smoke"), nested_sums.get_config(), multiplication.get_config()]
    configs += map(reference.get_config, ("apr", "sosp"))
    for name in ("countdown_text", "nested_sums_text", "nested_sums_fork"):
        configs.append(grpo.get_config("smoke") if name == "countdown_text" else nested_sums.get_config())
        configs[-1].task.name = name
    (folder / "traces.jsonl").write_text('{"prompt": "What is 2+3?", "answer": "5"}\n')
    configs.append(traces.get_config(str(folder / "traces.jsonl")))
    configs[-1].model.family = "llama"
    cases = [case for config in configs for case in _cases(config, rng)]
    no_package = {"gym"}  # its dialects are those of traces
    assert {case.task.name for case in cases} == set(TASKS) - no_package, "a task is not drilled"
    counts: collections.Counter[str] = collections.Counter()
    said = time.monotonic()
    for index in range(total):
        case = rng.choice(cases)
        text = mutate(rng.choice(case.texts), rng.choice(case.texts), rng)
        try:
            case.read(text, counts)
        except Exception as error:
            raise AssertionError(f"{case.task.name}, {case.method}: a reader does not survive {text!r}") from error
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"soak: readers: {index + 1:,} of {total:,} traces", flush=True)
    assert counts["right answers"] > 0
    assert counts["well-formed spawns"] > 0
    return f"{total:,} mutated traces, " + ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items()))


def mutate(text: str, other: str, rng: random.Random) -> str:
    """Returns the text with one to four things done to it that a model, a cut or a bad disk might do."""
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randint(0, len(text)) for _ in range(2))
        lines = text.splitlines(keepends=True)
        match rng.randrange(10):
            case 0:
                text = text[:at] + rng.choice(CHARACTERS) + text[at + 1 :]
            case 1:
                text = text[:at] + rng.choice(CHARACTERS) * rng.choice((1, 1, 1, 5_000)) + text[at:]
            case 2:
                text = text[:at] + text[min(to, at + 8) :]
            case 3:
                text = text[:at]
            case 4:
                text = text[:at] + other[rng.randint(0, len(other)) :]
            case 5 if lines:
                del lines[rng.randrange(len(lines))]
                text = "".join(lines)
            case 6 if lines:
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                text = "".join(lines)
            case 7 if len(lines) > 1:
                i, j = rng.sample(range(len(lines)), 2)
                lines[i], lines[j] = lines[j], lines[i]
                text = "".join(lines)
            case 8:
                text = re.sub(r"\d+", lambda m: m[0] if rng.random() < 0.9 else str(rng.randrange(300)), text)
            case 9:
                text = text.replace(" ", rng.choice(("", "  ", "\u00a0")), rng.randint(1, 3))
    return text[:200_000]


class Case:
    """A task's way of writing, problems with what threads wrote about them, and every reader of it."""

    def __init__(self, task: Task, method: str, dialect: Dialect, config: Config, rng: random.Random) -> None:
        self.task, self.method, self.dialect = task, method, dialect
        self.texts: list[str] = []
        self.problems: list[Any] = []
        draw, count = task.sampler(config, None), BuiltinTokenizer().encode
        for _ in range(40):
            problem = draw(rng)
            calls = dialect.demonstrate(problem, rng, config.task, lambda text: len(count(text)), budget=False)
            answer = dialect.demonstrated_answer(problem, calls)
            self.texts.extend(call.context + call.completion for call in calls)
            self.texts.extend([answer] if answer else [])
            self.problems.extend([problem] * (len(self.texts) - len(self.problems)))
        self._problem_of = dict(zip(self.texts, self.problems, strict=True))
        self._rng = rng

    def read(self, text: str, counts: collections.Counter[str]) -> None:
        """Gives the text to every reader."""
        task, dialect, problem = self.task, self.dialect, self._rng.choice(self.problems)
        task.vote(text)
        task.claims_answer(text)
        task.count_operations(text)
        task.path_solves(text, problem)
        answers = [text]
        if isinstance(dialect, ThreadDialect):
            ending = dialect.read_ending(text)
            assert (ending.answer is None) == (ending.status != "answered"), ending
            answers.extend([ending.answer] if ending.answer is not None else [])
        if isinstance(dialect, SpawnDialect):
            for last in (False, True):
                # A program reads a spawn where a thread's text ends in the mark of one.
                ended = text if text.endswith(dialect.spawn_end) else text + dialect.spawn_end
                spawn = dialect.read_spawn(ended, last_begin=last)
                if isinstance(spawn, SpawnCall):
                    counts["well-formed spawns"] += 1
                    assert len(spawn.contexts) == len(spawn.names)
                    assert spawn.contexts or task.reads_leniently
            child = dialect.read_child(text, "0,1")
            results = [child if isinstance(child, ChildResult) else ChildResult("0,1", None)]
            assert dialect.render_join(results, 1).endswith("\n")
            dialect.child_result(text, text, problem)
            if isinstance(dialect, PromiseDialect):
                dialect.result_line(0, results[0], 1)
            if isinstance(dialect, SpelledSpawnDialect):
                dialect.spawnable(text)
                dialect.may_name_more(text)
        if isinstance(dialect, ThoughtDialect):
            dialect.read_proposals(text, dialect.root(problem))
            dialect.read_value(text)
        for answer in answers:
            for asked in (problem, self._problem_of.get(answer, problem)):
                self._judge(answer, asked, counts)

    def _judge(self, answer: str, problem: Any, counts: collections.Counter[str]) -> None:
        verdict = self.task.verify(answer, problem)
        assert verdict.correct == (verdict.reason == "correct"), verdict
        if verdict.correct:
            counts["right answers"] += 1
            expression = self.task.express(answer, problem)
            if self.task.reads_leniently:  # and so takes some wrong answers for right ones
                return
            value, numbers = _evaluate(expression)
            facts = self.task.describe(problem)
            assert value == facts.get("target", value), f"{expression} is no answer to {facts}"
            if "numbers" in facts:
                assert sorted(numbers) == sorted(facts["numbers"]), f"{expression} uses other numbers than {facts}"


def _evaluate(expression: str) -> tuple[Fraction | None, list[int]]:
    """Computes an expression of whole numbers, by a parser of its own; (None, []) for what is none."""
    tokens = re.findall(r"\d+|[-+*/()]", expression)
    if "".join(tokens) != expression.replace(" ", ""):
        return None, []
    numbers: list[int] = []

    def factor() -> Fraction:
        token = tokens.pop(0)
        if token == "(":
            value = total()
            assert tokens.pop(0) == ")"
            return value
        numbers.append(int(token))
        return Fraction(int(token))

    def product() -> Fraction:
        value = factor()
        while tokens and tokens[0] in "*/":
            value = value * factor() if tokens.pop(0) == "*" else value / factor()
        return value

    def total() -> Fraction:
        value = product()
        while tokens and tokens[0] in "+-":
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    value = total()
    assert not tokens, f"{expression} is not read to its end"
    return value, numbers


def _cases(config_dict: Any, rng: random.Random) -> list[Case]:
    config = from_config_dict(config_dict)
    task = TASKS[config.task.name]
    return [Case(task, method, dialect, config, rng) for method, dialect in sorted(task.dialects.items())]
