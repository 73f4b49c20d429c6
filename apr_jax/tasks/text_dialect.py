"""Free text as a dialect: threads split their work by tags, each on a line of its own, for any task and any tokenizer.

    thread  PROMPT, then lines of text and spawns in any order, a result at the end, and EOS
    spawn   <spawn>          and its threads, numbered from 1:   <thread 1>
            ... threads ...                                      lines of text that say what is to be done
            </spawn>                                             </thread>
    join    <join>           in place of the spawn, with the threads' results or whatever they wrote;
            ... threads ...  only the engine writes it
            </join>
    result  <result>
            lines of text; none: there is no solution
            </result>

Reading is strict. Text that breaks the grammar has one of these reasons: wrote_join (`reasoning/adaptive.py`),
no_spawn_begin, empty_spawn, malformed_spawn (something between the threads, or one that is not closed), wrong_index,
empty_task, nested_tag (a tag inside a spawn, a task or a result), no_result, malformed_result (not closed, or not at
the end).
"""

import abc
import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed, SpawnCall, SpawnDialect

_RESULT_BEGIN, _RESULT_END = "<result>\n", "</result>\n"
TAG = re.compile(r"</?(?:spawn|join|result|thread)(?: [^<>\n]*)?>")
_THREAD = re.compile(r"<thread ([1-9][0-9]{0,5})>\n(.*?)</thread>\n", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Work:
    """A demonstration as a tree: what a thread writes, and the parts that it hands to others. Texts are whole lines."""

    question: str
    before: str = ""  # the parts are handed out
    parts: tuple["Work", ...] = ()
    after: str = ""
    result: str = ""  # a line or more; "": there is no solution


class TextForm(abc.ABC):
    """A task in words: what it asks, and how it is solved."""

    @abc.abstractmethod
    def question(self, problem: Any) -> str:
        """Return the prompt of a problem, in whole lines without tags."""

    @abc.abstractmethod
    def work(self, problem: Any, rng: random.Random, section: Any) -> Work:
        """Solve a problem. The question of the whole is that of `question`."""


class TextDialect(SpawnDialect):
    """The dialect of a task in words."""

    names_budget = True
    spawn_begin, spawn_end = "<spawn>\n", "</spawn>\n"
    join_begin, join_end = "<join>\n", "</join>\n"

    def __init__(
        self,
        form: TextForm,
        *,
        children: Literal["context", "fork"] = "context",
        joins: Literal["results", "texts"] = "results",
    ) -> None:
        """Make the dialect of a form.

        Args:
          children: begin from their task alone, or from a fork of their parent, after which their number stands.
          joins: hold the children's results, or all that the children wrote.
        """
        self._form, self._joins = form, joins
        self.children = children

    def prompt(self, problem: Any, budget: int | None = None, window: int | None = None) -> str:
        """Return the question, after a line with the number of threads that may be opened where there is one."""
        del window
        question = self._form.question(problem)
        if TAG.search(question) or not question.endswith("\n"):
            raise ValueError(f"the question {question!r} is not whole lines without tags")
        return (f"At most {budget} threads.\n" if budget is not None else "") + question

    def read_ending(self, text: str) -> Ending:
        start = text.rfind("\n" + _RESULT_BEGIN) + 1
        result = text[start + len(_RESULT_BEGIN) : -len(_RESULT_END)]
        if not start:
            return Ending(None, "malformed", "no_result")
        if not text.endswith(_RESULT_END) or start + len(_RESULT_BEGIN + _RESULT_END) > len(text):
            return Ending(None, "malformed", "malformed_result")
        if TAG.search(result) or (result and not result.endswith("\n")):
            return Ending(None, "malformed", "nested_tag" if TAG.search(result) else "malformed_result")
        return Ending(result[:-1], "answered", "") if result.strip() else Ending(None, "no_solution", "no_solution")

    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        del last_begin  # what has spawned is closed, and stands only in the text that a fork begins with
        start = text.rfind("\n" + self.spawn_begin) + 1
        if not start:
            return Malformed("no_spawn_begin")
        if text.count(self.spawn_begin, 0, start) != text.count(self.spawn_end, 0, start):
            return Malformed("nested_tag")
        tasks = _read_threads(text[start + len(self.spawn_begin) : -len(self.spawn_end)])
        if isinstance(tasks, Malformed):
            return tasks
        names = tuple(str(index) for index in range(1, len(tasks) + 1))
        contexts = tuple(f"<thread {name}>\n" for name in names) if self.children == "fork" else tuple(tasks)
        return SpawnCall(start, contexts, names, level=None)

    def read_child(self, text: str, name: str) -> ChildResult | Malformed:
        ending = self.read_ending(text)
        return Malformed(ending.reason) if ending.status == "malformed" else ChildResult(name, ending.answer)

    def render_join(self, results: Sequence[ChildResult], level: int | None) -> str:
        texts = [each.text if self._joins == "texts" else f"{each.path}\n" if each.path else "" for each in results]
        return self.join_begin + _render_threads(texts) + self.join_end

    def demonstrate(
        self, problem: Any, rng: random.Random, section: Any, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        work = self._form.work(problem, rng, section)
        return tuple(self._calls(work, self.prompt(problem, _count_parts(work) if budget else None), 0))

    def child_result(self, context: str, completion: str, problem: Any) -> str:
        ending = self.read_ending(context + completion)
        return ending.reason or ending.status

    def _calls(self, work: Work, context: str, depth: int) -> Iterator[Call]:
        """Yield the calls of a thread that was given `context`, and of all threads below it."""
        if not work.parts:
            yield _call(context, self._written(work), depth)
            return
        asked = work.before + self.spawn_begin + _render_threads([part.question for part in work.parts])
        asked += self.spawn_end
        yield dataclasses.replace(_call(context, asked, depth), ends_in_spawn=True)
        joined = work.before + self._join(work)
        yield _call(context + joined, self._written(work)[len(joined) :], depth)
        for name, part in enumerate(work.parts, start=1):
            forked = f"{context}{asked}<thread {name}>\n"
            yield from self._calls(part, forked if self.children == "fork" else part.question, depth + 1)

    def _written(self, work: Work) -> str:
        """Return all that stands after the prompt of a thread that has ended."""
        return "".join([work.before, self._join(work), work.after, _RESULT_BEGIN, work.result, _RESULT_END])

    def _join(self, work: Work) -> str:
        if not work.parts:
            return ""
        return self.render_join([ChildResult("", p.result[:-1] or None, self._written(p)) for p in work.parts], None)


def _read_threads(body: str) -> list[str] | Malformed:
    """Read the tasks of a spawn's threads."""
    tasks: list[str] = []
    place = 0
    while place < len(body):
        match = _THREAD.match(body, place)
        if match is None or (match[2] and not match[2].endswith("\n")):
            return Malformed("malformed_spawn")
        if int(match[1]) != len(tasks) + 1:
            return Malformed("wrong_index")
        if TAG.search(match[2]) or not match[2].strip():
            return Malformed("nested_tag" if TAG.search(match[2]) else "empty_task")
        tasks.append(match[2])
        place = match.end()
    return tasks or Malformed("empty_spawn")


def _render_threads(texts: Sequence[str]) -> str:
    return "".join(f"<thread {index}>\n{text}</thread>\n" for index, text in enumerate(texts, start=1))


def _count_parts(work: Work) -> int:
    return sum(1 + _count_parts(part) for part in work.parts)


def _call(context: str, completion: str, depth: int) -> Call:
    return Call(context, completion, depth, ends_in_spawn=False, replay_start=len(completion))
