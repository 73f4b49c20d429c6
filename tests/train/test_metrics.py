"""What is kept of metrics.jsonl when a run starts again."""

import json

import pytest

from apr_jax.files import read_jsonl
from apr_jax.train.metrics import MetricsWriter, cut


def _lines(*places):
    return "".join(json.dumps({"step": step, "phase": phase}) + "\n" for phase, step in places)


@pytest.mark.parametrize(
    ("phase", "step", "kept"),
    [
        ("sft", 0, []),
        ("sft", 1, [("sft", 1)]),
        ("sft", 2, [("sft", 1), ("sft", 2)]),
        ("grpo", 0, [("sft", 1), ("sft", 2)]),
        ("grpo", 1, [("sft", 1), ("sft", 2), ("grpo", 1)]),
    ],
)
def test_cut_keeps_what_the_checkpoint_knows(tmp_path, phase, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(_lines(("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)) + '{"step": 3, "phase": "gr')
    cut(path, phase, step)
    assert path.read_text() == _lines(*kept)


def test_writer_appends_and_refuses_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path, "sft", 0) as writer:
        writer.write("sft", 1, {"loss": 0.5, "reasons": {"no_call_begin": 2}})
        writer.write_timings("sft", 1, {"seconds": 0.1})
        with pytest.raises(FloatingPointError, match="sft step 2: loss is nan"):
            writer.write("sft", 2, {"loss": float("nan")})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "phase": "sft", "loss": 0.5, "reasons": {"no_call_begin": 2}}
    ]
    assert read_jsonl(tmp_path / "timings.jsonl") == [{"step": 1, "phase": "sft", "seconds": 0.1}]
    assert list((tmp_path / "tensorboard").iterdir())
    assert read_jsonl(tmp_path / "absent.jsonl") == []
