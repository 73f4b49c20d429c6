"""Rollouts of scripted imitators, with log-probabilities and advantages that tests can foretell."""

import random

from apr_jax.evaluation.run import evaluate
from tests.reasoning.fixtures import SMALL, TOKENIZER, Replay, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine


def evaluated(method, count=12, keep=8, seed=0):
    """Summary and records of the solver's own searches. Token n of a call has a log-probability drawn for n alone."""
    demos = list(demonstrations(SMALL, method, count, seed=seed))
    summary, records = evaluate(
        ScriptedEngine(Replay(demos)),
        TOKENIZER,
        [demo.problem for demo in demos],
        method=method,
        settings=settings(),
        seed=0,
        temperature=0.0,
        keep_calls=keep,
    )
    for record in records[:keep]:
        for call in record["calls"]:
            call["logprobs"] = [logprob(place) for place in range(len(call["tokens"]))]
    return summary, records


def logprob(place):
    """Of the token at this place of a call: mostly small, at times large."""
    return -round(random.Random(place).expovariate(1) ** 3, 4)
