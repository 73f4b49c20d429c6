"""The authors' own files to train on: SFT traces, a JSON list with an object a problem, and lists of prompts for RL.

    {"nums": [22, 26, 31, 53], "target": 27, "trace_dict": {"main_calls": [..], "sub_calls": [[{..}, ..], ..]}}
    {"nums": [22, 26, 31, 53], "target": 27, "search_path": "Current State: .."}

    "Moving to Node #0\\nCurrent State: 27:[22, 26, 31, 53], Operations: []"

The first is of APR: a thread's calls as whole texts, and for each spawn the same of its children. The second is SoS+'s.
The third is of either and says nothing of how the problem is solved.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from apr_jax.config import Config, ConfigError
from apr_jax.files import FileError, parse_json
from apr_jax.paths import path_of
from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import JOIN_END

_ADVICE = "name a file of the release, with nums, target and trace_dict (or search_path) in each object"
_GOAL = "Goal Reached\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig(CountdownConfig):
    """Countdown's section, and where the authors' own demonstrations are taken from."""

    traces: str  # their file, whose problems train is drawn from; "": problems and searches of our own

    @property
    def files(self) -> tuple[str, ...]:
        return (self.traces,) if self.traces else ()

    def check(self, config: Config) -> None:
        super().check(config)
        if self.traces and not path_of(self.traces).is_file():
            raise ConfigError(f"task.traces={self.traces!r}: no such file; {_ADVICE}")


@functools.lru_cache(maxsize=2)
def traces(path: str) -> Mapping[Problem, tuple[Call, ...]]:
    """Read a file to train on: each problem's calls, in the order of `Demonstration`, or () where it is a mere prompt.

    Of equal problems the last counts. Raises FileError, which names the item, for any other contents.
    """
    try:
        items = parse_json(path_of(path).read_bytes())
    except ValueError as error:
        raise FileError(f"{path}: {error}; {_ADVICE}") from error
    if not isinstance(items, list) or not items:
        raise FileError(f"{path}: no list of problems; {_ADVICE}")
    found: dict[Problem, tuple[Call, ...]] = {}
    for number, item in enumerate(items, start=1):
        try:
            if isinstance(item, str):
                found[trace.read_problem(item)] = ()
                continue
            problem = Problem(tuple(item["nums"]), item["target"])
            if "trace_dict" in item:
                found[problem] = tuple(_thread_calls(item["trace_dict"], 0))
            else:
                found[problem] = (_call(item["search_path"], 0, 0),)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}, item {number}: {type(error).__name__}: {error}; {_ADVICE}") from error
    return MappingProxyType(found)


def _thread_calls(trace_dict: Mapping[str, Any], depth: int) -> Iterator[Call]:
    """Yield a thread's calls, then those of the threads below it."""
    for text in trace_dict["main_calls"]:
        yield _call(text, text.rfind(JOIN_END) + len(JOIN_END) if JOIN_END in text else 0, depth)
    for children in trace_dict["sub_calls"]:
        for child in children:
            yield from _thread_calls(child, depth + 1)


def _call(text: str, given: int, depth: int) -> Call:
    """Return the call that wrote a text after its first `given` characters; 0: after its prompt."""
    prompt = trace.PROMPT.match(text)
    if prompt is None:
        raise ValueError(f"no prompt at the start of {text[:60]!r}")
    given = given or prompt.end()
    last = text.rfind(_GOAL)
    replay = max(given, text.rfind(_GOAL, 0, last) + len(_GOAL)) if text.count(_GOAL) > 1 else len(text)
    return Call(text[:given], text[given:], depth, False, replay - given)
