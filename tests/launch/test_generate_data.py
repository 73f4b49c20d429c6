import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "generate_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_it_measures_and_writes_both_searches(tmp_path: pathlib.Path) -> None:
    figures, searches = tmp_path / "figures.json", tmp_path / "searches.jsonl"
    done = _run("--num_problems=70", f"--json={figures}", f"--output={searches}")
    assert done.returncode == 0, done.stderr
    assert "70/70 problems" in done.stderr
    assert "\r" not in done.stderr  # plain lines where there is no terminal
    assert "70 problems in" in done.stdout
    written = json.loads(figures.read_text())
    assert set(written) == {
        "problems",
        "seconds",
        "problems_per_second_per_core",
        "serial_accuracy",
        "parallel_accuracy",
    }
    lines = [json.loads(line) for line in searches.read_text().splitlines()]
    assert len(lines) == written["problems"] == 70
    assert written["parallel_accuracy"] == sum(line["adaptive"]["correct"] for line in lines) / 70
    assert written["serial_accuracy"] == sum(line["serial"]["correct"] for line in lines) / 70


def test_it_counts_what_parallel_searches_write(tmp_path: pathlib.Path) -> None:
    figures = tmp_path / "figures.json"
    done = _run("--tokens", "--num_problems=5", "--config.data.num_workers=1", f"--json={figures}")
    assert done.returncode == 0, done.stderr
    assert "tokens one after the other" in done.stdout
    written = json.loads(figures.read_text())
    assert 100 < written["sequential_tokens"] < written["total_tokens"]
    assert 100 < written["serial_sequential_tokens"] == written["serial_total_tokens"]
    assert written["serial_solved_within_context"] <= written["serial_accuracy"]


def test_it_measures_the_methods_that_are_named(tmp_path: pathlib.Path) -> None:
    figures = tmp_path / "figures.json"
    methods = ("hogwild", "pasta", "tree_of_thoughts")
    done = _run(
        "--tokens",
        "--num_problems=5",
        "--config.data.num_workers=1",
        f"--methods={','.join(methods)}",
        f"--json={figures}",
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(figures.read_text())
    assert 50 < written["hogwild_sequential_tokens"] < written["hogwild_total_tokens"]
    assert "pasta_sequential_tokens" not in written, "its program sets the clock"
    assert 0 < written["pasta_solved_within_context"] <= written["pasta_accuracy"]
    assert written["tree_of_thoughts_accuracy"] == written["solved_within_context"] == 1.0


def test_it_measures_the_references_setting(tmp_path: pathlib.Path) -> None:
    figures = tmp_path / "figures.json"
    done = _run(
        "--config=configs/sft.py:paper", "--config.data.num_workers=1", "--num_problems=200", f"--json={figures}"
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())
    # The bound that matters, 88 a second, is measured by hand; a test must not time a busy machine.
    assert measured["problems_per_second_per_core"] > 0
    assert measured["problems"] == 200


def test_bad_arguments_exit_with_2() -> None:
    for arguments, message in (
        (["--methods=serial,sereal"], "--methods=serial,sereal: countdown has adaptive, direct, hogwild"),
        (["--num_problems=0"], "--num_problems=0: must be at least 1"),
        (["--config.task.min_number=30"], "task.min_number=30 is above task.max_number=20"),
        (["--config.task.max_number=1", "--config.task.min_target=30"], "none of 10000 draws"),
    ):
        refused = _run(*arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


def test_an_output_that_fills_its_disk_exits_with_1() -> None:
    failed = _run("--num_problems=1", "--output=/dev/full")
    assert failed.returncode == 1
    assert "No space left" in failed.stderr
    assert "Traceback" not in failed.stderr
