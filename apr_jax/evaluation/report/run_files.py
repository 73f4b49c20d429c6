"""A run's files as the pages read them. Each may be missing, and damage is one sentence that names the file."""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from apr_jax.checkpoints.phases import PHASES, saved_steps
from apr_jax.checkpoints.step_log import missing_steps, read_step_log
from apr_jax.files import read_json

MADE_ANEW = "start launch/train.py with this folder once more, which makes it anew"
METRICS_ADVICE = "remove the line, or restore the file"

Json = dict[str, Any]


def read_object(path: pathlib.Path) -> Json:
    """Return what is in config.json or summary.json, nothing where there is no file."""
    return read_json(path, MADE_ANEW) if path.exists() else {}


def read_metrics(run: pathlib.Path) -> tuple[list[Json], str]:
    """Return the steps of a run's metrics.jsonl, and a sentence on those that are damaged or missing, or "".

    The sentence goes to standard error, too.
    """
    path = run / "metrics.jsonl"
    log = read_step_log(path)
    saved = saved_steps(run)
    last = {
        phase: max([saved[phase], *(record["step"] for record in log.records if record["phase"] == phase)])
        for phase in PHASES
    }
    problems = log.damage + missing_steps(log.records, last)
    if not problems:
        return log.records, ""
    sentence = f"{path}: {'; '.join(problems)}"
    print(sentence, file=sys.stderr)
    return log.records, sentence


def evaluations(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the evaluations in a summary, by their names."""
    return {name: entry for name, entry in summary.items() if isinstance(entry, dict) and "accuracy" in entry}
