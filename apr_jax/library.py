"""apr_jax as a library: load a policy, and solve problems with it by any way of reasoning.

    import apr_jax

    policy = apr_jax.load("runs/laptop")  # a run, RUN/best, a checkpoint or a Hugging Face folder
    for solution in policy.solve([(33, [3, 7, 12]), (24, [4, 4, 8])], temperature=0.5, seed=1):
        print(solution.expression if solution.solved else solution.reason, solution.sequential_tokens)

Results depend on weights, configuration, seed, temperature and the problem's place in the list, and on nothing else.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import Config, ConfigError
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Observer, Program, Progress, Rollout, RolloutKey
from apr_jax.evaluation.export import Exported, export
from apr_jax.evaluation.metrics import record_rollout
from apr_jax.evaluation.policy import configure
from apr_jax.model.params import Params
from apr_jax.parallel.mesh import make_mesh, offer_cpu_devices
from apr_jax.paths import local_path
from apr_jax.policies import DEFAULT, policy_path
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.base import Outcome, Settings
from apr_jax.reasoning.policy_engine import EngineHolder, policy_engine
from apr_jax.reasoning.programs import check_method, make_program
from apr_jax.reasoning.sampling import innermost
from apr_jax.reasoning.settings import make_settings
from apr_jax.reasoning.writing import write
from apr_jax.tasks import task_of
from apr_jax.tasks.base import Task
from apr_jax.tasks.dialect import SpawnDialect

_LOG = logging.getLogger(__name__)

Method = str | Callable[[Any, Settings], Generator[Any, Any, Outcome]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
    """The answer of a policy to one problem, with its price."""

    problem: Any
    solved: bool  # by `Task.verify`, whatever the policy claims
    reason: str  # "correct", or in one snake_case word why it is not solved
    expression: str | None  # of a solved problem, for people: "(53-22)*2" (`Task.express`)
    answer: str | None  # what the policy claims, as it wrote it
    total_tokens: int  # generated, by all threads
    sequential_tokens: int  # of them one after the other: the longest causal chain
    num_threads: int
    latency_ms: float
    record: dict[str, Any]  # every figure of the meter (`evaluation.metrics.record_rollout`), JSON-able
    rollout: Rollout  # tokens and log-probabilities of each call


@dataclasses.dataclass(frozen=True)
class Text:
    """A policy's continuation of a prompt."""

    text: str
    reason: str  # why it did not end by itself, in one snake_case word; "": it did
    rollout: Rollout


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy with all that it takes to decode it. Made by `load`."""

    config: Config  # what it was trained with, and what replaced fields of that
    tokenizer: Tokenizer
    params: Params

    @property
    def task(self) -> Task:
        """The kind of problem that it solves."""
        return task_of(self.config)

    @property
    def engine(self) -> Engine:
        """The engine for the method that the policy was trained for."""
        return self.engine_for(self.config.data.method)

    def engine_for(self, method: str) -> Engine:
        """Return an engine that holds the policy, compiled when it is first asked for, with all that `method` will use.

        Where an earlier one lacks what `method` uses, another takes its place. Raises ConfigError where it does not fit
        the devices.
        """
        shares = self._holder.made_for or METHODS[innermost(method)].shares_cache  # one for shared caches runs all

        def make() -> Engine:
            mesh = make_mesh(self.config.mesh)
            return policy_engine(self.config, mesh, self.tokenizer, self.params, expects_groups=shares)

        return self._holder.get(shares, make)

    @functools.cached_property
    def _holder(self) -> EngineHolder[Engine]:
        return EngineHolder()

    def solve(
        self,
        problems: Sequence[Any],
        *,
        method: Method | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        budget: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        observer: Observer | None = None,
    ) -> list[Solution]:
        """Decode each problem once, all at the same time, and verify the answers.

        Args:
          problems: as the task reads them (`Task.read_problem`): Countdown's are a Problem, or a target and numbers,
            `(27, [22, 26, 31, 53])`.
          method: a way of reasoning as `reasoning.programs.make_program` takes it, or a program of your own
            (docs/extending.md); None is the one that the policy was trained for.
          temperature: 0 is greedy.
          budget: written into prompts; sub calls, or for a serial method tokens. Other methods may have none.
          on_progress, observer: as of `Engine.run`.
        Raises: ValueError for no problem (`Problem`), an unknown method, several samples at temperature 0, a budget
          that the method has not, or a problem that the tokenizer cannot spell.
        """
        asked = [self.task.read_problem(problem) for problem in problems]
        name = method if isinstance(method, str) else self.config.data.method
        if not callable(method):
            check_method(name, self.task, temperature, budget=budget)
        settings = make_settings(self.config, self.tokenizer, name, budget=budget)
        make: Callable[[Any], Program] = (
            (lambda problem: method(problem, settings))
            if callable(method)
            else (lambda problem: make_program(name, problem, settings))
        )
        programs = [(RolloutKey(index, 0), make(problem)) for index, problem in enumerate(asked)]
        rollouts = self.engine_for(name).run(
            programs, seed=seed, temperature=temperature, on_progress=on_progress, observer=observer
        )
        name = getattr(method, "__name__", name) if callable(method) else name
        return [self._solution(problem, rollout, name) for problem, rollout in zip(asked, rollouts, strict=True)]

    @property
    def spawns(self) -> SpawnDialect | None:
        """The dialect of the spawns that it was trained to write; None for a method without spawns of that kind."""
        method = METHODS[self.config.data.method]
        return self.task.dialect(method.dialect, SpawnDialect) if method.kind is SpawnDialect else None

    def write(
        self,
        prompt: str,
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        spawns: SpawnDialect | None = None,
        observer: Observer | None = None,
    ) -> list[Text]:
        """Go on with any prompt, several times at once.

        Args:
          prompt: what it goes on with; a user's message where `tokenizer.chats`.
          spawns: run spawns of this dialect, such as `policy.spawns`; None: all is text.
          observer: as of `Engine.run`.
        Raises: ConfigError for a prompt that fills the context, ValueError for one that the tokenizer cannot spell.
        """
        longest, tokens = self.config.model.max_seq_len, len(self.tokenizer.encode_prompt(prompt))
        if tokens >= longest:
            raise ConfigError(f"the prompt has {tokens} tokens, and model.max_seq_len={longest} leaves no room")
        settings = make_settings(self.config, self.tokenizer)
        programs = [(RolloutKey(0, sample), write(prompt, settings, spawns)) for sample in range(num_samples)]
        rollouts = self.engine.run(programs, seed=seed, temperature=temperature, observer=observer)
        return [Text(rollout.result.text, rollout.result.reason, rollout) for rollout in rollouts]

    def export(self, out: str | pathlib.Path, weight_type: str = "F32") -> None:
        """Write the policy as a Hugging Face folder, or as FILE.gguf (`evaluation.export`). `load` reads it back."""
        export(
            Exported(self.config.model, self.params, self.tokenizer, self.config),
            local_path(out, "an exported policy"),
            weight_type,
        )

    def _solution(self, problem: Any, rollout: Rollout, method: str) -> Solution:
        record = record_rollout(
            problem, rollout, self.tokenizer, self.config.model, method=method, keep_calls=False, task=self.task
        )
        solved, answer = record["correct"], record["answer"]
        return Solution(
            problem=problem,
            solved=solved,
            reason=record["verdict"],
            expression=self._expression(answer, problem) if solved else None,
            answer=answer,
            total_tokens=record["total_tokens"],
            sequential_tokens=record["sequential_tokens"],
            num_threads=record["num_threads"],
            latency_ms=record["latency_ms"],
            record=record,
            rollout=rollout,
        )

    def _expression(self, answer: str, problem: Any) -> str:
        """Return a right answer for people. One that a task cannot express costs nothing but its looks."""
        try:
            return self.task.express(answer, problem)
        except Exception:
            _LOG.warning("the task %r cannot express the answer %.200r", self.task.name, answer, exc_info=True)
            return answer


def load(
    checkpoint: str | pathlib.Path = DEFAULT,
    *,
    config: ConfigDict | None = None,
    fallback: ConfigDict | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a policy.

    Args:
      checkpoint: a run folder (its newest checkpoint), RUN/best, a checkpoint folder, a Hugging Face folder, or a GGUF
        file, or the name of a policy that comes with the package ("multiplication"); by default its first.
      config: in place of the configuration that it was trained with.
      fallback: where it brings none, as from Hugging Face.
      overrides: single fields of the configuration: `{"engine.lanes": 8}`.
    Raises:
      FileNotFoundError: there is no policy.
      CheckpointError, HuggingFaceError: it is damaged.
      ConfigError: it has no configuration, or one that does not go with its weights.
    """
    folder = policy_path(checkpoint)
    offer_cpu_devices()  # before the weights start JAX; how many the mesh needs, they will tell
    model, params, saved = load_policy(folder)
    given = fallback if config is None and saved is None else config
    chosen, tokenizer = configure(folder, model, saved, given, overrides or {})
    return Policy(chosen, tokenizer, params)
