"""Problems and traces of the user's own: `task.name=traces:FILE.jsonl`, one JSON object a line (docs/tasks.md).

    {"prompt": "What is 2+3+4?", "answer": "9", "calls": [
        "<spawn>\\n<thread 1>\\nWhat is 2+3?\\n</thread>\\n</spawn>\\n", "5+4=9\\n<result>\\n9\\n</result>\\n",
        "<result>\\n5\\n</result>\\n"]}

`calls` is what threads wrote, in the order of `Demonstration`: a parent's calls, then those of each child with all
below it. Contexts and joins follow from that, as the engine makes them. Without calls the answer alone is the
demonstration.
"""

import abc
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from apr_jax.config import Config, ConfigError, TaskConfig, shown
from apr_jax.files import parse_json
from apr_jax.paths import path_of
from apr_jax.tasks.base import Call, CountTokens, Split, Task, Verdict
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed
from apr_jax.tasks.text_dialect import TAG, TextDialect, TextForm, Work

_ADVICE = "docs/tasks.md says what a line holds"
_ENDS_IN_TAG = re.compile(TAG.pattern + "$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedConfig(TaskConfig, abc.ABC):
    """The part of a section that names a file of traces, whose problems train is drawn from."""

    traces: str  # FILE.jsonl

    @property
    def files(self) -> tuple[str, ...]:
        return (self.traces,) if self.traces else ()

    @abc.abstractmethod
    def problem_of(self, item: Mapping[str, Any]) -> Any:
        """Return the problem of a line's object. Raises ValueError."""

    def check(self, config: Config) -> None:
        from apr_jax.tasks import TASKS  # which has this module's task

        dialect = TASKS[self.name].dialects.get(config.data.method)
        if isinstance(dialect, TracedDialect):
            read_traces(self, dialect)


class TracedDialect(TextDialect):
    """The text dialect, with demonstrations from a file. A result may end without a newline."""

    unit: ClassVar[str] = "threads"  # of the budget that a prompt names

    def __init__(self, form: TextForm, instruction: str = "") -> None:
        """Make the dialect of a form; `instruction` is a line at the end of each prompt, children's too."""
        super().__init__(form)
        self._instruction = instruction

    def prompt(self, problem: Any, budget: int | None = None, window: int | None = None) -> str:
        named = f"At most {budget} {self.unit}.\n" if budget is not None else ""
        return named + self._form.question(problem) + self._instruction

    def child_prompt(self, context: str, window: int | None) -> str:
        return context + self._instruction

    def read_ending(self, text: str) -> Ending:
        return super().read_ending(f"{text}\n" if text.endswith("\n</result>") else text)

    def demonstrate(
        self, problem: Any, rng: random.Random, section: Any, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        theirs = read_traces(section, self).get(problem)
        if not theirs:
            return super().demonstrate(problem, rng, section, count_tokens, budget=budget)
        texts = rng.choice(theirs)
        calls = self.read_calls(texts, self.prompt(problem))
        if budget:
            children = sum(not call.ends_in_spawn for call in calls) - 1
            calls = self.read_calls(texts, self.prompt(problem, children))
        return calls

    def read_calls(self, texts: Sequence[str], prompt: str) -> tuple[Call, ...]:
        """Return the calls of threads that wrote these texts. Raises ValueError where the engine would not go on."""
        left = iter(texts)
        calls, _ = self._thread(left, prompt, "", 0)
        if next(left, None) is not None:
            raise ValueError(f"{len(calls)} calls are all that its spawns ask for, and more follow")
        return tuple(calls)

    def _thread(self, texts: Iterator[str], context: str, name: str, depth: int) -> tuple[list[Call], ChildResult]:
        """Take the calls of a thread, then those of all threads below it."""
        written: list[str] = []
        while not written or written[-1].endswith(self.spawn_end):
            written.append(next(texts, ""))
            if not written[-1]:
                raise ValueError(f"a thread lacks its last call: that of {context[:60]!r}")
        own, below, text = [], list[Call](), context
        for part in written:
            own.append(Call(text, part, depth, part.endswith(self.spawn_end), len(part)))
            text += part
            if self.join_begin in part:
                raise ValueError("a call holds a join, which only the engine writes")
            if not own[-1].ends_in_spawn:
                break
            spawn = self.read_spawn(text)
            if isinstance(spawn, Malformed):
                raise ValueError(f"a spawn is malformed ({spawn.reason})")
            results = []
            for child, asked in zip(spawn.names, spawn.contexts, strict=True):
                calls, result = self._thread(texts, self.child_prompt(asked, None), child, depth + 1)
                below += calls
                results.append(result)
            text = text[: spawn.start] + self.render_join(results, None)
        end = self.read_child(text, name)
        if isinstance(end, Malformed):
            raise ValueError(f"a thread ends malformed ({end.reason}): that of {context[:60]!r}")
        return own + below, end


class OneThreadDialect(TracedDialect):
    """The same for one thread, which opens no others."""

    names_budget = False
    unit = "tokens"

    def read_calls(self, texts: Sequence[str], prompt: str) -> tuple[Call, ...]:
        calls = super().read_calls(texts, prompt)
        if len(calls) > 1:
            raise ValueError("it spawns, and data.method is one thread: name data.method=adaptive")
        return calls


def dialects_of(form: TextForm, one: str = "", many: str = "") -> Mapping[str, TracedDialect]:
    """Return a form's dialects, with their instructions for one thread and for many."""
    alone = {method: OneThreadDialect(form, one) for method in ("direct", "serial")}
    return MappingProxyType({"adaptive": TracedDialect(form, many), **alone})


@functools.lru_cache(maxsize=4)
def read_traces(section: TracedConfig, dialect: TracedDialect) -> Mapping[Any, tuple[tuple[str, ...], ...]]:
    """Read the section's file: what threads wrote for each of its problems, once for each line that has calls.

    Raises ConfigError, which names the line, where a dialect cannot read it.
    """
    path, found = section.traces, dict[Any, list[tuple[str, ...]]]()
    if not path:
        return {}
    try:
        lines = path_of(path).read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"task.traces={shown(path)}: cannot be read ({reason}); {_ADVICE}") from error
    answers: dict[Any, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
            if not isinstance(item, dict):
                raise ValueError("no JSON object")
            problem, texts = section.problem_of(item), _texts(item)
            prompt, answer = whole_lines(item["prompt"]), item.get("answer", "")
            if answers.setdefault(prompt, answer) != answer:
                raise ValueError("another line has this prompt with another answer")
            found.setdefault(problem, [])
            if texts:
                dialect.read_calls(texts, dialect.prompt(problem))
                found[problem].append(texts)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}; {_ADVICE}") from error
    if not found:
        raise ConfigError(f"{path}: holds no line; {_ADVICE}")
    return MappingProxyType({problem: tuple(theirs) for problem, theirs in found.items()})


def text_field(item: Mapping[str, Any], field: str) -> str:
    """Return a field of a line that must be text and not blank. Raises ValueError."""
    value = item.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field!r} must be text, and is {shown(value) if field in item else 'missing'}")
    return value


def whole_lines(text: str) -> str:
    """Return a prompt with a newline at its end. Raises ValueError where a line of it ends in a tag."""
    if _ENDS_IN_TAG.search(text):
        raise ValueError("a line of the prompt ends in a tag of threads, which prompts may only mention")
    return text.rstrip("\n") + "\n"


def _texts(item: Mapping[str, Any]) -> tuple[str, ...]:
    calls = item.get("calls", [])
    if not isinstance(calls, list) or any(not isinstance(call, str) or not call.strip() for call in calls):
        raise ValueError("'calls' must be a list of texts, one for each call")
    return tuple(call if call.endswith("\n") else f"{call}\n" for call in calls)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, in whole lines, and its answer."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracesConfig(TracedConfig):
    """The section of a task that is a file."""

    def problem_of(self, item: Mapping[str, Any]) -> Asked:
        return _asked(item)

    def check(self, config: Config) -> None:
        if not self.traces:
            raise ConfigError("task.traces='': name a file, as task.name=traces:FILE.jsonl")
        super().check(config)


class _AskedForm(TextForm):
    def question(self, problem: Asked) -> str:
        return problem.prompt

    def work(self, problem: Asked, rng: random.Random, section: Any) -> Work:
        return Work(problem.prompt, result=f"{problem.answer}\n")


class Traces(Task):
    """Prompts with one right answer each, compared up to blanks. All splits are drawn from the same file."""

    name = "traces"
    named_by = "traces"
    section = TracesConfig
    problem_fields = ("traces",)
    dialects = dialects_of(_AskedForm())
    example = "What is 2+3? => 5"

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Asked]:
        dialect = self.dialects.get(config.data.method, self.dialects["adaptive"])
        assert isinstance(config.task, TracesConfig)
        problems = tuple(read_traces(config.task, dialect))
        return lambda rng: rng.choice(problems)

    def verify(self, answer: str | None, problem: Asked) -> Verdict:
        if answer is None:
            return Verdict(False, "no_answer")
        same = answer.split() == problem.answer.split()
        return Verdict(True, "correct") if same else Verdict(False, "wrong_answer")

    def key(self, problem: Asked) -> str:
        return problem.prompt

    def vote(self, answer: str | None) -> str | None:
        return None if answer is None else " ".join(answer.split())

    def describe(self, problem: Asked) -> dict[str, Any]:
        return {"title": " ".join(problem.prompt.split())[:80], **dataclasses.asdict(problem)}

    def read_problem(self, value: Any) -> Asked:
        if isinstance(value, Asked):
            return value
        if isinstance(value, str):
            prompt, arrow, answer = value.rpartition(" => ")
            value = {"prompt": prompt, "answer": answer} if arrow else value
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)} is no prompt with its answer")
        return _asked(value)


def _asked(item: Mapping[str, Any]) -> Asked:
    answer = text_field(item, "answer").strip("\n")
    if TAG.search(answer):
        raise ValueError("the answer holds a tag of threads")
    return Asked(whole_lines(text_field(item, "prompt")), answer)


TRACES = Traces()
