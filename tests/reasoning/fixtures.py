"""Settings, tasks and scripts that the tests of reasoning and evaluation share."""

import dataclasses
import random
from collections.abc import Iterable, Sequence

from apr_jax.data.tokenizer import Tokenizer, load_tokenizer
from apr_jax.engine.threads import Path
from apr_jax.reasoning.base import Settings
from apr_jax.tasks.base import Call, Demonstration
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.pasta import SYNC
from apr_jax.tasks.countdown.rules import sample_problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.dialect import CALL_END
from apr_jax.tasks.generation import demonstrate
from tests.configs import COUNTDOWN4_TASK, LAPTOP, LAPTOP_TASK, PAPER_TASK

TOKENIZER = load_tokenizer("builtin")
SMALL = LAPTOP_TASK  # three numbers, fixed order
MODEL = LAPTOP.model
REFERENCE = PAPER_TASK  # four numbers, shuffled, spawns by chance
# Four numbers, nothing left out, states restated; parents that go on when children have failed.
DEPTH_FIRST = dataclasses.replace(COUNTDOWN4_TASK, parent_beams=(2,), retry_probability=1.0)


def settings(**changes: object) -> Settings:
    values = Settings(
        task=COUNTDOWN,
        tokenizer=TOKENIZER,
        max_children=100,
        max_spawns=8,
        max_depth=1,
        max_total_children=1000,
        cancel_on_success=False,
        spawn_grammar=None,
        tree_of_thoughts=LAPTOP.tree_of_thoughts,
        context_window=None,
        max_tokens=None,
        budget=None,
    )
    return dataclasses.replace(values, **changes)


def demonstrations(
    task: CountdownConfig, method: str, count: int, *, budget: bool = False, seed: int = 0
) -> Iterable[Demonstration]:
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        problem = sample_problem(rng, task)
        yield demonstrate(problem, rng, task, method, budget, lambda text: len(TOKENIZER.encode(text)))


def call_tokens(call: Call, tokenizer: Tokenizer = TOKENIZER) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A demonstrated call as the engine should see it: the context's tokens, and the generated ones."""
    context = (tokenizer.bos_id, *tokenizer.encode(call.context))
    return context, (*tokenizer.encode(call.completion), *(() if call.ends_in_spawn else (tokenizer.eos_id,)))


class Replay:
    """Writes what demonstrations wrote in the very same context; KeyError where a context differs in one token."""

    def __init__(self, demos: Iterable[Demonstration]) -> None:
        self.script = dict(call_tokens(call) for demo in demos for call in demo.calls)

    def __call__(self, path: Path, tokens: list[int]) -> Sequence[int]:
        return self.script[tuple(tokens)]


class TextScript:
    """Per thread path, what its successive calls write. A text that ends in no spawn and no sync is ended by EOS."""

    def __init__(self, texts: dict[Path, list[str]]) -> None:
        self._texts = {path: list(calls) for path, calls in texts.items()}

    def __call__(self, path: Path, tokens: list[int]) -> Sequence[int]:
        text = self._texts[path].pop(0)
        return [*TOKENIZER.encode(text), *([] if text.endswith((CALL_END, SYNC)) else [TOKENIZER.eos_id])]
