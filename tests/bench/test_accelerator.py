"""Checks of an accelerator: tolerances, and failures, which are shown and stop nothing."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.bench import accelerator, accelerator_report, decode, training_report
from apr_jax.bench.accelerator import Check, Subject, distance, random_rows
from apr_jax.bench.roofline import Limits
from apr_jax.kernels import for_training
from apr_jax.model.attention import xla_attention
from tests.engine.helpers import make_mesh
from tests.train.small import small_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def subject():
    return Subject.of(small_config(), make_mesh(2))


def _raise():
    raise RuntimeError("out of memory:\n  12 GB")


def test_a_check_agrees_within_its_tolerances_alone():
    def row(**found):
        return Check(name="x", run=lambda: found, tolerances={"a": 0.1, "b": 1.0}, reason="because").row()

    assert row(a=0.1, b=0.0, more=7.0)["agrees"]
    assert not row(a=0.2, b=0.0)["agrees"]
    assert not row(a=math.nan, b=0.0)["agrees"]


def test_what_is_raised_is_a_failure_with_its_reason():
    row = Check(name="x", run=_raise, tolerances={}, reason="because").row()
    assert not row["agrees"]
    assert row["error"] == "RuntimeError: out of memory: 12 GB"
    assert "FAILED" in accelerator_report.line("x", row)
    assert accelerator_report.measured(_raise)["error"] == "RuntimeError: out of memory: 12 GB"


def test_distances_are_relative_and_see_nan():
    a, b = [np.full(4, 1.0, np.float32)], [np.full(4, 2.0, np.float32)]
    assert distance(a, b) == 0.5
    assert distance(b, b) == 0.0
    assert math.isnan(distance([np.full(4, np.nan)], b))


def test_a_wrong_attention_differs(subject, monkeypatch):
    """Attention that sees one token too many is no rounding."""

    def sees_the_next(q_BTNH, k_BTKH, v_BTKH, ids_BT, ends_BT):
        return xla_attention(q_BTNH, jnp.roll(k_BTKH, -1, 1), jnp.roll(v_BTKH, -1, 1), ids_BT, ends_BT)

    check = accelerator._attention_check(subject, "float32")
    assert check.row()["agrees"]
    kernels = for_training(subject.config.model, "cpu")
    wrong = dataclasses.replace(kernels, attention=sees_the_next)
    monkeypatch.setattr(accelerator, "for_training", lambda *_: wrong)
    found = check.row()
    assert not found["agrees"]
    assert min(found["found"].values()) > 0.1


def test_speed_is_that_of_decoding_and_of_training(monkeypatch):
    for module in (decode, training_report):
        monkeypatch.setattr(module, "measure_limits", lambda mesh, dtype: Limits(1e9, 1e12))
    config = small_config(**{"sft.row_len": 256, "task.num_numbers": 3})
    measurements = accelerator_report.measurements(config, make_mesh(2))
    rows = {name: accelerator_report.measured(measure) for name, measure in measurements.items()}
    assert list(rows) == ["decode, 2 + 92 tokens", "SFT step"]
    decoded, trained = (row["figures"] for row in rows.values())
    assert decoded["lanes"]["8"]["devices"] == 2
    assert trained["sft"]["contestants"]["apr_jax"]["tokens_per_second"] > 0
    assert "tokens/s" in accelerator_report.line("SFT step", rows["SFT step"])


def test_rows_are_packed_as_training_packs_them(subject):
    rows = random_rows(2, subject.config.model, 0)
    T = subject.config.model.max_seq_len
    assert all(array.shape == (2, T) for array in rows.values())
    assert rows["weights"].sum() == pytest.approx(1.0)
    begins = np.flatnonzero(np.diff(rows["segment_ids"][0], prepend=-1))
    assert (rows["positions"][0][begins] == 0).all()


def test_the_page_names_what_differs(tmp_path):
    good = Check(name="decode, auto", run=lambda: {"a": 0.0}, tolerances={"a": 0.1}, reason="a reason").row()
    bad = Check(name="prefill", run=lambda: {"a": 1.0}, tolerances={"a": 0.1}, reason="another <reason>").row()
    figures = {
        "device": "TPU v5 lite",
        "mesh": {"data": 4, "fsdp": 1, "tensor": 1},
        "model": {"num_params": 5},
        "config": "paper",
        "kernel": "kernels.tpu",
        "memory_gb": None,
        "versions": {"jax": "0.10.2"},
        "checks": {"decode, auto": good, "prefill": bad},
        "speed": {"SFT step": {"left_out": "--minutes=8 are over", "seconds": 0.0}},
    }
    assert accelerator_report.failures(figures) == ["prefill"]
    accelerator_report.write_page(str(tmp_path / "check.html"), figures)
    page = (tmp_path / "check.html").read_text()
    for said in ("1 of 3 parts differ or failed", "4 x TPU v5 lite", "DIFFERS", "another &lt;reason&gt;", "are over"):
        assert said in page
