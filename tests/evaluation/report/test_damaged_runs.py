"""The pages of a run whose files are torn, other JSON or incomplete say so in a sentence that names the file."""

import json

import pytest

from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.evaluation.report.run_report import write_figure, write_report
from apr_jax.evaluation.run import save_rollouts
from apr_jax.files import FileError
from configs.grpo import get_config
from tests.evaluation.made_rollouts import evaluated

BAD = [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}", b'{"a": 1e999}']


@pytest.fixture(scope="module")
def evaluation():
    return evaluated("adaptive", keep=2)


@pytest.fixture
def run(tmp_path, evaluation):
    summary, records = evaluation
    (tmp_path / "config.json").write_text(json.dumps(to_dict(from_config_dict(get_config()))))
    (tmp_path / "summary.json").write_text(json.dumps({"before": summary, "after": summary}))
    save_rollouts(tmp_path / "rollouts.jsonl", {"after": records})
    (tmp_path / "grpo_rollouts").mkdir()
    save_rollouts(tmp_path / "grpo_rollouts" / "2.jsonl", {"after": records})
    steps = [{"step": step, "phase": "sft", "loss": 1 / step} for step in range(1, 9)]
    steps += [{"step": step, "phase": "grpo", "accuracy": 0.1 * step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "summary.json", "rollouts.jsonl", "grpo_rollouts/2.jsonl"])
@pytest.mark.parametrize("content", BAD, ids=[f"{content[:20]!r}" for content in BAD])
def test_what_cannot_be_read_is_one_sentence(run, name, content):
    path = run / name
    path.write_bytes(content + b"\n" if content else b"\xff\n")
    with pytest.raises(FileError) as error:
        write_report(run)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"model": 3}),
        ("config.json", {"task": {"name": "no such task"}, "model": {}, "data": {}}),
        ("summary.json", {"before": {"accuracy": "much"}}),
        ("summary.json", {"before": {"accuracy": 1.0}}),
        ("summary.json", {"before": {"accuracy": None}}),
        ("rollouts.jsonl", {"calls": [3]}),
        ("rollouts.jsonl", {"calls": "x", "num_children": 1}),
        ("grpo_rollouts/2.jsonl", {"calls": [{"path": 1}]}),
        ("metrics.jsonl", {"step": 9, "phase": "sft", "loss": "low"}),
    ],
)
def test_other_contents_are_one_sentence(run, name, content):
    (run / name).write_text(json.dumps(content) + "\n")
    with pytest.raises(FileError, match="unexpected contents") as error:
        write_report(run)
    assert str(error.value).startswith(str(run / name))


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        (b"\xff\xfe\n", "line 3 is damaged: not UTF-8"),
        (b"[1]\n", "line 3 is damaged: expected a JSON object"),
        (b'{"step": 3, "phase": "x"}\n', "phase &#39;x&#39; is none of sft, grpo"),
        (b"", "step 3 of sft is missing"),
    ],
)
def test_the_page_and_the_terminal_say_what_the_metrics_lack(run, capsys, line, damage):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[3:]]))
    source = write_report(run).read_text()
    assert damage in source
    assert "step 3 of sft is missing" in source
    assert "step 3 of sft is missing" in capsys.readouterr().err
    write_figure(run, run / "figure.svg")


def test_steps_that_only_a_checkpoint_knows_are_missing(run, capsys):
    (run / "checkpoints" / "grpo" / "6").mkdir(parents=True)
    assert "steps 5 to 6 of grpo are missing" in write_report(run).read_text()
    assert capsys.readouterr().err.startswith(f"{run / 'metrics.jsonl'}: ")
