"""Paired comparisons by hand, and the picture of two runs."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from apr_jax.evaluation.report.paired_report import compare, draw_runs, paired_difference


def test_paired_difference_by_hand():
    first, second = [100.0, 200.0, 300.0, 400.0], [90.0, 160.0, 270.0, 280.0]  # differences 10, 40, 30, 120
    difference = paired_difference(first, second)
    assert (difference.first, difference.second, difference.change) == (250, 200, -50)
    assert difference.relative == pytest.approx(-0.2)
    half = 1.959964 * np.std([10, 40, 30, 120], ddof=1) / 2
    assert difference.change_low == pytest.approx(-50 - half)
    assert difference.change_high == pytest.approx(-50 + half)
    assert -0.3 <= difference.relative_low < -0.2 < difference.relative_high < -0.09


def test_what_all_problems_share_has_no_spread():
    difference = paired_difference([10.0] * 9, [8.0] * 9)
    assert difference.change_low == difference.change_high == -2
    assert difference.relative_low == difference.relative_high == pytest.approx(-0.2)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_unequal_or_single_problems_are_refused(first, second):
    with pytest.raises(ValueError, match="the same problems, 2 or more"):
        paired_difference(first, second)


def test_records_are_compared_by_figure():
    def records(correct, sequential):
        return [{"correct": c, "sequential_tokens": sequential, "total_tokens": 5, "num_children": 0} for c in correct]

    differences = compare(records([True, False, True], 300), records([True, True, True], 150))
    assert differences["accuracy"].change == pytest.approx(1 / 3)
    assert differences["sequential_tokens"].relative == -0.5
    assert differences["num_children"].relative == 0


def test_runs_in_one_picture(tmp_path):
    for name, slope in (("correct", 1), ("path", -1)):
        steps = [
            {"step": s, "phase": "grpo", "accuracy": 0.5, "sequential_tokens": 300 + slope * s, "children_per_spawn": 4}
            for s in range(1, 5)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    runs = {"correct & more": tmp_path / "correct", "path": tmp_path / "path"}
    draw_runs(runs, tmp_path / "runs.svg")
    texts = [element.text for element in ElementTree.parse(tmp_path / "runs.svg").iter() if element.text]
    assert texts.count("correct & more") == texts.count("path") == 3
    with pytest.raises(ValueError, match=r"must end in \.svg"):
        draw_runs(runs, tmp_path / "runs.png")
    with pytest.raises(ValueError, match="no step of GRPO"):
        draw_runs({"none": tmp_path}, tmp_path / "runs.svg")
