"""A run's files that are torn, flipped, missing or another program's: what a run reads back it checks."""

import json
import shutil

import pytest

from apr_jax.checkpoints.best import mend_scores, read_scores, write_scores
from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.config import ConfigError
from apr_jax.files import FileError
from apr_jax.lock import LockedError, locked
from apr_jax.train import evaluations
from apr_jax.train.metrics import cut
from apr_jax.train.run import train
from tests.train.small import small_config

heavy = pytest.mark.heavy
BAD = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}", b'{"a": NaN}', b"{}"]
BAD += [b'{"validation_loss": {"x": 1}}', b'{"validation_loss": {"1": null}}', b'{"validation_loss": [1]}']


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@heavy
def test_what_is_damaged_is_said_and_made_again_and_nothing_finished_is_lost(config, whole, copy, capsys):
    _flip(_largest(copy / "checkpoints" / "reference"))
    (copy / "checkpoints" / "sft" / "best.json").write_bytes(b"{")
    evaluation = copy / "evaluations" / "before.json"
    evaluation.write_text(evaluation.read_text().replace('"num_problems": 4', '"num_problems": 5'))
    (copy / "evaluations" / "after.json").write_bytes(b"[" * 100_000)
    (copy / "checkpoints" / "grpo" / "2" / "meta" / "metadata").write_bytes(b"")
    train(config, copy)
    said = capsys.readouterr().err
    for words in (
        "reference cannot be used",
        "sft/best.json: not JSON",
        "before.json: another",
        "after.json: not JSON",
    ):
        assert words in said
    for name in ("metrics.jsonl", "checkpoints/grpo/best.json"):
        assert (copy / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (read_scores(folder / "checkpoints" / "sft", "sft") for folder in (copy, whole))
    assert ours.items() >= theirs.items()
    assert sorted(path.name for path in (copy / "checkpoints" / "unusable").iterdir()) == ["grpo-2", "reference"]
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (copy, whole))
    assert {label: one["accuracy"] for label, one in ours.items()} == {k: one["accuracy"] for k, one in theirs.items()}


@heavy
def test_a_reference_that_cannot_be_made_again_is_missed_before_anything_is_written(config, copy):
    shutil.rmtree(copy / "checkpoints" / "reference")
    shutil.rmtree(copy / "checkpoints" / "sft")
    before = (copy / "metrics.jsonl").read_bytes()
    (copy / "config.json").write_text("as it was")
    with pytest.raises(CheckpointError, match="no checkpoint of SFT is left"):
        train(config, copy)
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert (copy / "config.json").read_text() == "as it was"


@heavy
@pytest.mark.parametrize(
    "change", [{"seed": 9}, {"sft.rows_per_step": 8}, {"sft.num_steps": 9}, {"grpo.clip_ratio": 0.1}]
)
def test_a_refused_start_writes_nothing(config, copy, change):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    refused = small_config(
        **{"data.directory": config.data.directory, "grpo.num_steps": 2, "grpo.checkpoint_every": 1, **change}
    )
    with pytest.raises(ConfigError):
        train(refused, copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path != copy} == {
        path: time for path, time in before.items() if path != copy
    }


@heavy
def test_a_second_run_in_the_folder_is_refused(config, copy, whole):
    with locked(copy / "lock", ""), pytest.raises(LockedError, match="choose another --workdir"):
        train(config, copy)
    assert (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("content", BAD, ids=[f"{content[:20]!r}" for content in BAD])
def test_damaged_scores_are_one_sentence_and_come_back_from_the_metrics(tmp_path, capsys, content):
    records = [{"phase": "sft", "step": step, "validation_loss": 1 / step} for step in (1, 2, 3)]
    records += [{"phase": "grpo", "step": step, "validation_accuracy": 0.1 * step} for step in (1, 2, 3)]
    (tmp_path / "best.json").write_bytes(content)
    with pytest.raises(FileError, match=r"best\.json: .*makes it anew"):
        read_scores(tmp_path, "sft")
    mend_scores(tmp_path, "sft", records)
    assert read_scores(tmp_path, "sft") == {1: 1.0, 2: 0.5, 3: 1 / 3}
    (tmp_path / "best.json").unlink()
    mend_scores(tmp_path, "grpo", records)
    assert read_scores(tmp_path, "grpo") == {1: 0.2, 2: pytest.approx(0.3)}
    assert "best.json" in capsys.readouterr().err


def test_a_changed_score_is_noticed(tmp_path):
    write_scores(tmp_path, "sft", {1: 0.5, 2: 0.25})
    path = tmp_path / "best.json"
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(CheckpointError, match="another checksum"):
        read_scores(tmp_path, "sft")


@pytest.mark.parametrize("content", BAD, ids=[f"{content[:20]!r}" for content in BAD])
def test_a_damaged_evaluation_is_said_and_done_again(tmp_path, capsys, content):
    path = tmp_path / "before.json"
    assert evaluations._read(path) is None
    path.write_bytes(content)
    assert evaluations._read(path) is None
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: ")
    assert said.endswith("; it is done again\n")
    assert said.count("\n") == 1


def _lines(*steps):
    return [json.dumps({"step": step, "phase": "sft", "loss": 0.5}) + "\n" for step in steps]


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        (b"\xff\xfe\n", "line 3 is damaged: not UTF-8"),
        (b"[1]\n", "line 3 is damaged: expected a JSON object, found list"),
        (b"3\n", "line 3 is damaged: expected a JSON object, found int"),
        (b'{"step": 3, "phase": "x"}\n', "line 3 is damaged: phase 'x' is none of sft, grpo"),
        (b'{"step": 3}\n', "line 3 is damaged: phase None"),
        (b'{"step": "3", "phase": "sft"}\n', "line 3 is damaged: step '3' is no whole number"),
        (b'{"step": -3, "phase": "sft"}\n', "line 3 is damaged: step -3 is no whole number"),
        (b'{"step": 3, "phase": ["sft"]}\n', "line 3 is damaged: phase ['sft']"),
        (b'{"step": 3, "phase": "sft", "loss": NaN}\n', "line 3 is damaged: not JSON (the number NaN"),
        (b"\n", "line 3 is damaged: empty"),
        (b"[" * 100_000 + b"\n", "line 3 is damaged: not JSON (nested too deeply)"),
    ],
)
def test_a_damaged_line_and_its_step_are_named_and_the_file_is_kept(tmp_path, capsys, line, damage):
    path = tmp_path / "metrics.jsonl"
    before = b"".join([*map(str.encode, _lines(1, 2)), line, *map(str.encode, _lines(4, 5))])
    path.write_bytes(before)
    cut(path, "sft", 4, {"sft": 4})
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: {damage}")
    assert "step 3 of sft is missing" in said
    assert path.read_text() == "".join(_lines(1, 2, 4))
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([1, 2, 3, 4], None),
        ([1, 3, 4], "step 2 of sft is missing"),
        ([1, 4], "steps 2 to 3 of sft are missing"),
        ([2, 4], "steps 1 and 3 of sft are missing"),
        ([], "steps 1 to 4 of sft are missing"),
    ],
)
def test_missing_lines_are_named(tmp_path, capsys, there, missing):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_lines(*there)) + '{"torn')
    cut(path, "sft", 4, {"sft": 4})
    assert path.read_text() == "".join(_lines(*there))
    assert capsys.readouterr().err == ("" if missing is None else f"{path}: {missing}; the run goes on\n")


def test_a_changed_number_is_noticed(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_lines(1, 2)))
    crc = cut(path, "sft", 2, {"sft": 2})
    assert cut(path, "sft", 2, {"sft": 2}, crc) == crc
    assert capsys.readouterr().err == ""
    path.write_text("".join(_lines(1, 2)).replace("0.5", "0.6"))
    cut(path, "sft", 2, {"sft": 2}, crc)
    assert "its lines are not those that were written" in capsys.readouterr().err
