"""Rollouts of scripted imitators, with log-probabilities and advantages that tests can foretell."""

import random

from apr_jax.evaluation.compare.grid import Cell, Row
from apr_jax.evaluation.compare.store import Results
from apr_jax.evaluation.run import evaluate
from tests.reasoning.fixtures import SMALL, Replay, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine


def evaluated(method, count=12, keep=8, seed=0, window=100_000):
    """Summary and records of the solver's own searches. Token n of a call has a log-probability drawn for n alone."""
    demos = list(demonstrations(SMALL, method, count, seed=seed))
    summary, records = evaluate(
        ScriptedEngine(Replay(demos), max_seq_len=window),
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


def made_comparison(workdir, count=12, methods=("adaptive", "serial"), windows=(200, 400)):
    """A folder as launch/compare.py leaves it, of imitators; of cons@4, which is as good as one sample, too."""
    results = Results(workdir)
    for method in methods:
        for window in windows:
            for wrapper, temperature in (("", 0.0), ("", 1.0), ("cons@4:", 1.0)):
                summary, records = evaluated(method, count, window=window)
                cell = Cell(Row(wrapper + method, wrapper + method, method), None, temperature, window)
                if wrapper:
                    tokens, accuracy = summary["total_tokens"], summary["accuracy"]
                    summary = {**summary, "total_tokens": 4 * tokens, "tokens_at_k": [k * tokens for k in range(1, 5)]}
                    summary |= {f"{kind}_at_k": [accuracy] * 4 for kind in ("pass", "cons", "best")}
                settings = {"problems": "made", "seed": 0, "engine.lanes": 4, "method": str(cell)}
                about = {"program": cell.row.program, "policy": method, "checkpoint": f"runs/{method}", "lanes": 4}
                about |= {"problems": "test", "seed": 0, "machine": "a machine", "date": "2026-01-31"}
                about |= {"command": f"python launch/compare.py --methods={cell.row.label}"}
                results.add(cell, settings, summary | about, records)
