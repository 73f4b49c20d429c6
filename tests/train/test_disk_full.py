"""A disk that is full, or a file that may not be written, ends a run with its name, and the same command goes on.

A limit on the size of files stands in for the full disk: the system refuses the same writes, with another number.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import resource

import pytest

from apr_jax.data.demonstrations import load_split
from apr_jax.files import explain
from apr_jax.train.board import Board
from apr_jax.train.metrics import MetricsWriter
from apr_jax.train.run import train

heavy = pytest.mark.heavy
pytestmark = pytest.mark.usefixtures("capsys")  # which holds what is printed in memory, and not in a file


@contextlib.contextmanager
def files_of(size):
    """No file may become larger within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@heavy
@pytest.mark.parametrize(
    ("size", "file"),
    [
        (10_000, "tokenizer.json"),
        (30_000, "run/checkpoints/sft"),
        pytest.param(45_000, "run/checkpoints", marks=pytest.mark.slow),
        (70_000, "run"),
    ],
)
def test_a_run_names_what_it_cannot_write_and_goes_on_later(config, whole, tmp_path, size, file):
    workdir = tmp_path / "run"
    with files_of(size), pytest.raises(OSError, match="File too large") as error:
        train(config, workdir)
    assert file in str(error.value.filename)
    assert explain(error.value).endswith("raise the limit on the size of files (ulimit -f) and start again")
    train(config, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@heavy
def test_a_data_set_that_does_not_fit_is_named_and_built_later(config, tmp_path):
    data = dataclasses.replace(config.data, directory=str(tmp_path / "data"))
    elsewhere = dataclasses.replace(config, data=data)
    with files_of(3_000), pytest.raises(OSError, match="File too large") as error:
        load_split(elsewhere, "train")
    assert str(error.value.filename).startswith(str(tmp_path / "data"))
    assert len(load_split(elsewhere, "train")) == config.data.num_train


def _broken_board(code):
    def flush(self):
        raise OSError(code, os.strerror(code))

    return flush


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_files_for_people_never_stop_the_work(tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(Board, "flush", _broken_board(code))
    (tmp_path / "timings.jsonl").mkdir()
    (tmp_path / "grpo_rollouts").touch()
    with MetricsWriter(tmp_path, "grpo", 0) as writer:
        for step in range(1, 100):
            writer.write("grpo", step, {"reward": 1.0})
            writer.write_timings("grpo", step, {"seconds": 1.0})
            writer.write_rollouts(step, [{}])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 99
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(line.endswith("; the run goes on without it") for line in said)
    assert any(f"tensorboard: {os.strerror(code)}" in line for line in said)


def test_tensorboard_on_a_full_disk_does_not_hang(tmp_path, capsys):
    with files_of(4_000), MetricsWriter(tmp_path, "sft", 0) as writer:
        for step in range(1, 3_000):
            writer.write_timings("sft", step, {f"rate {index}": 1.0 for index in range(8)})
    assert {pathlib.Path(line.split(": ")[0]).name for line in capsys.readouterr().err.splitlines()} == {
        "tensorboard",
        "timings.jsonl",
    }


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    def write(first, last):
        with MetricsWriter(tmp_path, "sft", first - 1) as writer:
            for step in range(first, last + 1):
                writer.write("sft", step, {"loss": 0.5})

    with files_of(100), pytest.raises(OSError, match="File too large") as error:
        write(1, 99)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    write(3, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [f'{{"step": {step}, "phase": "sft", "loss": 0.5}}' for step in (1, 2, 3)]
