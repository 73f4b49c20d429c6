"""Countdown as the authors' checkpoints write it and their code scores it: one task for APR, one for SoS+.

Both are read twice. The rollout goes on from what the lenient reading finds, and is scored by it; the strict reading
of `tasks/countdown/` then says whether the same text would have counted there.
"""

import random
from collections.abc import Callable, Sequence
from types import MappingProxyType

from apr_jax.config import Config
from apr_jax.tasks.base import Split, ThreadText, Verdict
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.tasks.dialect import Dialect, Malformed
from apr_jax.tasks.reference import reading
from apr_jax.tasks.reference.dialects import ReferenceAdaptive, ReferenceSerial
from apr_jax.tasks.reference.files import ReferenceConfig, traces

Judge = Callable[[str | None, Problem], Verdict]


class ReferenceCountdown(Countdown):
    """Countdown with one of the released scorers."""

    section = ReferenceConfig
    reads_leniently = True

    def __init__(self, name: str, method: str, dialect: Dialect, judge: Judge) -> None:
        self.name = name
        self.dialects = MappingProxyType({method: dialect})
        self._judge = judge

    def verify(self, answer: str | None, problem: Problem) -> Verdict:
        return self._judge(answer, problem)

    def express(self, answer: str, problem: Problem) -> str:
        """Return the answer as an expression where the strict verifier finds it right, else as it was written."""
        return rules.express(answer, problem) if rules.verify(answer, problem).correct else answer

    def handed_back(self, text: str) -> str | None:
        return reading.read_result(text)

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Problem]:
        """Return what draws a problem; one of `task.traces` for train, where that names a file."""
        assert isinstance(config.task, ReferenceConfig)
        if split == "train" and config.task.traces:
            problems = tuple(traces(config.task.traces))
            return lambda rng: rng.choice(problems)
        return super().sampler(config, split)

    def read_strictly(self, problem: Problem, threads: Sequence[ThreadText]) -> Verdict:
        """Judge a rollout as `tasks/countdown/` would have, which would not have gone on after malformed text.

        Reasons are those of its readers, with `spawn_` or `child_` before them, or the strict verifier's.
        """
        answer = None
        for thread in threads:
            text = thread.text if thread.text.endswith("\n") else f"{thread.text}\n"
            if thread.depth == 0 and reading.ends_in_spawn(text):
                spawn = ADAPTIVE.read_spawn(text)
                if isinstance(spawn, Malformed):
                    return Verdict(False, f"spawn_{spawn.reason}")
                if spawn.level != 1:
                    return Verdict(False, "spawn_wrong_level")
            elif thread.depth and thread.is_last:
                departure = _child_departure(text, thread.ended)
                if departure:
                    return Verdict(False, f"child_{departure}")
            elif thread.is_last:
                if not thread.ended:
                    return Verdict(False, "truncated")
                answer, status, reason = trace.read_ending(text)
                if answer is None:
                    return Verdict(False, reason or status)
        return rules.verify(answer, problem)


def _child_departure(text: str, ended: bool) -> str | None:
    """Return why a child's text hands back something else when it is read strictly; None where it does not."""
    lenient = reading.read_result(text)
    result = trace.read_child(text, trace.thread_node(text) or "") if ended else Malformed("truncated")
    if isinstance(result, Malformed):
        return None if lenient is None else result.reason
    return None if result.path == lenient else "other_path"


REFERENCE_APR = ReferenceCountdown("reference_apr", "adaptive", ReferenceAdaptive(), reading.verify_path)
REFERENCE_SOSP = ReferenceCountdown("reference_sosp", "serial", ReferenceSerial(), reading.verify_search)
