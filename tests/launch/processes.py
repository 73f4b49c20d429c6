"""Runs of launch/ as processes of their own: their environment, and the comparison of what two of them left."""

import json
import os
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# Of summary.json: times, and work that depends on when a run was stopped.
_NOT_REPEATED = {"latency_ms", "tokens_per_second", "seconds", "prefilled_tokens", "flops"}


def environment(place, **more):
    """The environment of runs that share compiled programs in `place`, whatever the size of these."""
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **more,
    }


def assert_same_run(ours, theirs):
    """Two folders of runs hold the same metrics, byte for byte, and the same figures but for times."""
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (ours, theirs)]
    figures = [
        {label: {key: value for key, value in of.items() if key not in _NOT_REPEATED} for label, of in summary.items()}
        for summary in summaries
    ]
    assert figures[0] == figures[1]
