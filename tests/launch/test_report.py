"""launch/report.py as a user runs it."""

from tests.evaluation.made_rollouts import made_comparison
from tests.launch.test_evaluate import launched


def test_a_comparison_becomes_a_page(tmp_path):
    made_comparison(tmp_path / "runs" / "comparison", methods=("adaptive",))
    done = launched("report.py", tmp_path)
    assert done.stdout == "runs/comparison/report.html\n"
    assert "python launch/report.py" in (tmp_path / "runs" / "comparison" / "report.html").read_text()


def test_without_a_comparison_it_says_what_to_do(tmp_path):
    done = launched("report.py", tmp_path, check=1)
    assert "run launch/compare.py first" in done.stderr
    done = launched("report.py", tmp_path, "--run=nowhere", check=2)
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
