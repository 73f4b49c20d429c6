"""The types that all tasks share: splits of problems, demonstrations as training sequences, verdicts, and Task."""

import abc
import dataclasses
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from apr_jax.config import Config, ConfigError, DataConfig, TaskConfig

if TYPE_CHECKING:
    from apr_jax.tasks.dialect import Dialect

Split = Literal["train", "validation", "test", "test_unseen_targets"]
HELD_OUT_SPLITS: tuple[Split, ...] = ("validation", "test", "test_unseen_targets")
SPLITS: tuple[Split, ...] = ("train", *HELD_OUT_SPLITS)

OnProgress = Callable[[str, int, int], None]  # split, demonstrations done, demonstrations in all
CountTokens = Callable[[str], int]
D = TypeVar("D")


@dataclasses.dataclass(frozen=True)
class Call:
    """One training sequence: what a thread was given and what it then wrote, up to a spawn or to its end."""

    context: str  # ends in a newline; no loss
    completion: str  # ends in a newline
    depth: int  # 0 = the parent, 1 = its children, 2 = theirs
    ends_in_spawn: bool  # True: completion ends in the mark of a spawn or a wait; False: EOS follows
    replay_start: int  # where in completion the replay of the winning path begins; len(completion) if there is none


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A problem and how it is solved, as training sequences.

    The parent's calls come in order, then the children's in spawn order; where children have children of their own,
    each child's calls are followed by those of all threads below it, before its next sibling's.
    """

    problem: Any
    method: str  # the way of reasoning whose threads write so
    calls: tuple[Call, ...]
    answer: str | None
    correct: bool


@dataclasses.dataclass(frozen=True)
class ThreadText:
    """A thread's whole text as one of its calls left it, prompt included."""

    text: str
    depth: int  # 0 = the root
    ended: bool  # with EOS
    is_last: bool  # call of its thread


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of an answer; `reason` is "correct" or the first thing found wrong, in snake_case."""

    correct: bool
    reason: str


def split_size(data: DataConfig, split: Split) -> int:
    """Return the number of problems of a split."""
    sizes: dict[Split, int] = {
        "train": data.num_train,
        "validation": data.num_validation,
        "test": data.num_test,
        "test_unseen_targets": data.num_test_unseen_targets,
    }
    return sizes[split]


class TaskLacksError(ConfigError):
    """A task was asked for a part that it does not have. The message names both."""


class Task(abc.ABC):
    """A kind of problem: where problems come from, how they are solved, and which answers are right.

    A problem may be any hashable object that pickles. What a model writes is data: no method raises for it, except
    where its docstring says so. Methods that are not abstract are parts which a task may lack.
    """

    name: str
    section: type[TaskConfig]  # of the configuration
    named_by: str | None = None  # the field of the section that a name NAME:VALUE sets
    problem_fields: tuple[str, ...]  # of the section: those that problems depend on, and not demonstrations alone
    example: str  # a problem as `read_words` takes it, for messages
    counts_by_context: bool = False  # so that `count_operations` needs the context
    reads_leniently: bool = False  # so that `read_strictly` is to be asked, too
    dialects: Mapping[str, "Dialect"]  # by way of reasoning: how its threads write, and demonstrations of that

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks of all dialects, each once."""
        return tuple(dict.fromkeys(mark for dialect in self.dialects.values() for mark in dialect.marks))

    @abc.abstractmethod
    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Any]:
        """Return what draws a problem of a split (None: any problem). Raises ConfigError where there can be none."""

    @abc.abstractmethod
    def verify(self, answer: str | None, problem: Any) -> Verdict:
        """Judge an answer (None: there is none)."""

    @abc.abstractmethod
    def describe(self, problem: Any) -> dict[str, Any]:
        """Return the problem as a JSON object, which `read_problem` reads back; "title" names it for people."""

    @abc.abstractmethod
    def read_problem(self, value: Any) -> Any:
        """Return the problem that a JSON value or a short form of the task's own describes. Raises ValueError."""

    def read_words(self, words: Sequence[str]) -> Any:
        """Return the problem that the words of a command line describe. Raises ValueError."""
        return self.read_problem(" ".join(words))

    def key(self, problem: Any) -> Hashable:
        """Return what makes two problems the same: no two splits have one of the same key."""
        return problem

    def vote(self, answer: str | None) -> Hashable | None:
        """Return what makes two answers the same for cons@N; None where there is nothing to count."""
        return answer

    def express(self, answer: str, problem: Any) -> str:
        """Return a right answer as people read it."""
        return answer

    def equation(self, expression: str, problem: Any) -> str:
        """Return a right answer, as `express` gave it, in one line with its problem."""
        return f"{self.describe(problem)['title']} = {expression}"

    def claims_answer(self, text: str) -> bool:
        """Tell whether the end of a thread's text claims an answer."""
        return False

    def departures(self, problem: Any, section: Any) -> list[str]:
        """Say in what a problem is unlike those that the section draws; nothing where it could be one of them."""
        return []

    def is_solvable(self, problem: Any) -> bool | None:
        """Tell whether the problem has an answer; None where that is not known quickly."""
        return None

    def count_operations(self, text: str, context: str = "") -> tuple[int, int]:
        """Count the steps that a thread wrote out after its context, and those of them that are right.

        The context is empty for a task that does not count by it (`counts_by_context`).
        """
        return 0, 0

    def path_solves(self, path: str, problem: Any) -> bool:
        """Tell whether what a child handed back solves the whole problem."""
        return False

    def handed_back(self, text: str) -> str | None:
        """Return what a child's whole text hands back, as the answer then repeats it; None for nothing.

        Raises TaskLacksError where answers do not repeat it: then credit cannot follow it.
        """
        raise TaskLacksError(f"answers of the task {self.name!r} do not repeat what children hand back")

    def read_strictly(self, problem: Any, threads: Sequence[ThreadText]) -> Verdict:
        """Judge a rollout, all of whose calls are given in order, by a stricter reading than it was decoded with.

        Raises TaskLacksError where there is no other reading (`reads_leniently`).
        """
        raise TaskLacksError(f"the task {self.name!r} is read in one way")

    def draw_fact(self, rng: random.Random, section: Any) -> tuple[str, Any]:
        """Draw a step of the task on its own: its text up to the result, and the result.

        Raises TaskLacksError where the task has no such steps: then `data.facts_share` must be 0.
        """
        raise TaskLacksError(f"the task {self.name!r} has no bare facts to learn; set data.facts_share=0")

    def dialect(self, method: str, kind: type[D]) -> D:
        """Return the dialect of a way of reasoning. Raises TaskLacksError where it has none of that kind."""
        dialect = self.dialects.get(method)
        if dialect is None:
            raise TaskLacksError(
                f"the task {self.name!r} has no dialect for {method!r}; it has one for {', '.join(self.dialects)}"
            )
        if not isinstance(dialect, kind):
            raise TaskLacksError(f"the dialect of the task {self.name!r} for {method!r} is no {kind.__name__}")
        return dialect
