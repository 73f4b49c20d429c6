"""Several independent samples of any way of reasoning, and one answer chosen among them.

    cons@8:adaptive     self-consistency: the answer that most of 8 samples give
    best@8:serial       the sample that the model itself finds most likely
    pass@8:adaptive     a sample that the verifier finds right: what the best of all choices could reach
    retry@3:adaptive    one sample after the other, at most 3, until one gives an answer

* `cons`: Wang et al. 2022 (arXiv 2203.11171, section 2), as Pan et al. 2025 (arXiv 2504.15466, section 5) count it:
  samples without a valid answer are dropped, the others vote with their final answer. The task says which answers are
  the same (`Task.vote`; for Countdown paths of the same operations, whatever the order of steps and of operands that
  commute). Of answers with equally many votes, the one that was given first wins.
* `best`: sample and rank, by the mean log-probability of the tokens that the sample's root thread generated in its
  life, spawn texts included. The mean and not the sum: Chen et al. 2021 (arXiv 2107.03374, section 3.3 and figure 7)
  found the mean better than a random choice and the sum worse; Wang et al. normalise alike (their equation 1).
  Children's tokens do not count: they are no part of the text that answers. The probabilities are those of the sampling
  policy, at the temperature that was drawn at.
* `pass`: the verifier chooses. That is no way to reason but a bound; pass@k for k below n is estimated without bias
  (Chen et al. 2021, equation 1) by `evaluation.metrics`.
* `retry`: ours. No verifier is asked: a policy that searches knows when it has found nothing. So more is spent only
  where the search failed, was malformed or cut off, and the chain gets longer by each try.

Each sample is a child thread with a path, and so with random numbers, of its own. The prompt is prefilled once: samples
are forks of it, its partial last page included. Limits on a rollout hold for all samples together: each is given one
part in n + 1 of rollout.max_total_tokens (`engine.threads.Spawn`) and in n of rollout.max_total_children; a try gets
half of the tokens that are left.

What differs: the papers draw samples one by one, each with its own prompt; here all but tries are drawn side by side,
so that the longest chain is that of the longest sample.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from apr_jax.config import ConfigError
from apr_jax.engine.threads import Join, Open, Prefill, Program, Spawn, Thread
from apr_jax.reasoning.base import Outcome, Sample, Tally
from apr_jax.tasks.base import Task
from apr_jax.tasks.dialect import Ending

Choose = Callable[[Sequence[Sample], Any, Task], int]

_FORM = re.compile(r"([a-z]+)@([1-9][0-9]{0,3}):(.+)")


def most_likely(samples: Sequence[Sample], problem: Any, task: Task) -> int:
    """Return the index of the answer whose mean log-probability is highest, the first of equals; 0 if none."""
    answered = [index for index, sample in enumerate(samples) if sample.answer is not None]
    likelihood = [float("-inf") if s.mean_logprob is None else s.mean_logprob for s in samples]
    return max(answered, key=lambda index: likelihood[index], default=0)


def majority(samples: Sequence[Sample], problem: Any, task: Task) -> int:
    """Return the index of the first sample with the answer that most samples give, the first of equals; 0 if none."""
    answers = [task.vote(sample.answer) for sample in samples]
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(votes, key=lambda answer: votes[answer])) if votes else 0  # Counter keeps the order


def verified(samples: Sequence[Sample], problem: Any, task: Task) -> int:
    """Return the index of the first sample that is right, else of the first with an answer; 0 if none has one."""
    right = (index for index, s in enumerate(samples) if task.verify(s.answer, problem).correct)
    answered = (index for index, s in enumerate(samples) if s.answer is not None)
    return next(right, next(answered, 0))


CHOICES: Mapping[str, Choose] = MappingProxyType({"best": most_likely, "cons": majority, "pass": verified})
_NAMES = (*CHOICES, "retry")


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """The parts of `NAME@N:METHOD`."""

    choose: Choose | None  # None: samples are tries, one after the other
    num_samples: int
    inner: str


def innermost(method: str) -> str:
    """Return the way of reasoning that a method's wrappers, if any, sample: `adaptive` of `cons@8:adaptive`."""
    return method.rpartition(":")[2]


def read_wrapper(method: str) -> Wrapper | None:
    """Return the wrapper that a method's name begins with; None for a plain name. Raises ConfigError if malformed."""
    if not {"@", ":"} & {*method}:
        return None
    match = _FORM.fullmatch(method)
    if match is None or match[1] not in _NAMES:
        raise ConfigError(
            f"method {method!r}: samples are asked for as NAME@N:METHOD, where NAME is one of {', '.join(_NAMES)}, N "
            "from 1 to 9999 and METHOD a way of reasoning, such as cons@8:adaptive"
        )
    return Wrapper(CHOICES.get(match[1]), int(match[2]), match[3])


def sampled(choose: Choose, problem: Any, task: Task, programs: Sequence[Program]) -> Generator[Any, Any, Outcome]:
    """Run the programs, each a sample of one way of reasoning, side by side, and answer as one of them does.

    Its outcome is that of the sample chosen, with the counts of all and the `samples` themselves. Samples are not
    children in these counts.
    """
    requests, prompt = yield from _begun(programs)
    handle = yield Spawn([_sample(p, first, prompt) for p, first in zip(programs, requests, strict=True)])
    ended: list[tuple[Outcome, float | None]] = yield Join(handle)
    samples = tuple(
        Sample(answer=o.answer, status=o.status, reason=o.reason, mean_logprob=logprob) for o, logprob in ended
    )
    tally = Tally()
    for outcome, _ in ended:
        tally.add(outcome)
    chosen = samples[choose(samples, problem, task)]
    return tally.outcome(Ending(chosen.answer, chosen.status, chosen.reason), samples)


def retried(programs: Sequence[Program]) -> Generator[Any, Any, Outcome]:
    """Run the programs, each a try of one way of reasoning, one after the other up to the first that answers.

    The outcome is that of the last one that ran, with the counts of all. Tries are not children in these counts.
    """
    requests, prompt = yield from _begun(programs)
    tally = Tally()
    for program, first in zip(programs, requests, strict=True):
        handle = yield Spawn([_sample(program, first, prompt)])
        ((outcome, _),) = yield Join(handle)
        tally.add(outcome)
        if outcome.answer is not None:
            break
    return tally.outcome(Ending(outcome.answer, outcome.status, outcome.reason))


def _begun(programs: Sequence[Program]) -> Generator[Any, Any, tuple[list[Any], Thread | None]]:
    """Return the programs' first requests, and the prompt, prefilled, that all of them open; None where they differ."""
    requests = [program.send(None) for program in programs]
    prompt = None
    if _is_prompt(requests[0]) and all(request == requests[0] for request in requests):
        prompt = yield requests[0]
        yield Prefill(prompt)
    return requests, prompt


def _is_prompt(request: Any) -> bool:
    return isinstance(request, Open) and request.fork_of is None


def _sample(program: Program, request: Any, prompt: Thread | None) -> Generator[Any, Any, tuple[Outcome, float | None]]:
    """Go on with a program from its first request, its thread a fork of `prompt`, which holds the same tokens.

    Return its outcome and the mean log-probability of what its thread generated; None if that is nothing.
    """
    thread: Thread | None = None
    if prompt is not None:
        request = dataclasses.replace(request, tokens=(), fork_of=prompt)
    try:
        while True:
            reply = yield request
            if isinstance(request, Open):
                thread = reply
            try:
                request = program.send(reply)
            except StopIteration as end:
                return end.value, thread.logprob / thread.generated if thread and thread.generated else None
    finally:
        program.close()
