"""launch/report.py as a user runs it."""

from tests.evaluation.made_rollouts import made_comparison
from tests.launch.test_evaluate import launched


def test_a_comparison_becomes_a_page(tmp_path):
    made_comparison(tmp_path / "runs" / "comparison", methods=("adaptive",))
    done = launched("report.py", tmp_path)
    assert done.stdout == "runs/comparison/report.html\n"
    assert "python launch/report.py" in (tmp_path / "runs" / "comparison" / "report.html").read_text()


def test_a_runs_own_page_goes_where_out_says(tmp_path):
    run = tmp_path / "runs" / "laptop"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "grpo", "accuracy": 0.5}\n')
    done = launched("report.py", tmp_path, "--run=runs/laptop", "--out=page.html")
    assert done.stdout == "page.html\n"
    assert "GRPO: share of rollouts solved" in (tmp_path / "page.html").read_text()
    assert not (run / "report.html").exists()
    assert launched("report.py", tmp_path, "--run=runs/laptop").stdout == "runs/laptop/report.html\n"
    done = launched("report.py", tmp_path, "--run=runs/laptop", "--out=nowhere/page.html", check=2)
    assert "--out=nowhere/page.html: there is no folder nowhere; make it first" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_comparison_it_says_what_to_do(tmp_path):
    done = launched("report.py", tmp_path, check=1)
    assert "run launch/compare.py first" in done.stderr
    done = launched("report.py", tmp_path, "--run=nowhere", check=2)
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
