"""The page of a comparison: every row, figures with intervals and the paper's beside them, safe and self-contained."""

import json
import re
import shutil

import pytest

from apr_jax.evaluation.compare.store import read_results
from apr_jax.evaluation.metrics import wilson_interval
from apr_jax.evaluation.report import paper
from apr_jax.evaluation.report.comparison_report import curves_of, write_comparison
from apr_jax.evaluation.report.curves import Curve, Point, accuracy_chart
from tests.evaluation.made_rollouts import made_comparison
from tests.evaluation.report.test_run_report import EVIL, Page, text_of


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("comparison")
    made_comparison(workdir)
    return workdir


@pytest.fixture(scope="module")
def source(workdir):
    write_comparison(workdir, workdir / "report.html", command="python launch/report.py --comparison=it")
    return (workdir / "report.html").read_text()


def test_every_row_stands_in_the_table_with_its_interval(workdir, source):
    text = " ".join(text_of(Page(source)).split())
    rows = read_results(workdir)
    assert len(rows) == 12
    for row in rows:
        low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
        assert f"{100 * row['accuracy']:.1f} % ({low:.1f} to {high:.1f})" in text
    assert "12 problems (test)" in text
    assert "engines of 4 lanes" in text
    assert "Against adaptive, temperature 0, window 200" in text


def test_figures_stand_beside_the_papers_and_name_their_commands(workdir, source):
    for key in ("context-window", "total-tokens", "sequential-tokens", "latency-ms", "num-samples"):
        figure = source[source.index(f'<figure id="{key}">') :]
        figure = figure[: figure.index("</figure>")]
        assert figure.count("<svg") == 1 + (key != "sequential-tokens")  # of which the paper gives no accuracy
        assert "<table>" in figure
        for row in read_results(workdir):
            assert row["command"] in figure
    assert paper.ABOUT in text_of(Page(source))
    assert "python launch/report.py --comparison=it" in source
    assert 'id="behaviour"' not in source  # no run was named


def test_nothing_is_loaded_and_model_text_is_data(workdir, source):
    page = Page(source)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "srcset", "action")]
    assert set(re.findall(r"https?://[^\s\"'<>]+", source)) == {"http://www.w3.org/2000/svg"}
    write_comparison(workdir, workdir / "evil.html", command=EVIL)
    evil = Page((workdir / "evil.html").read_text())
    assert evil.tags.count("script") == page.tags.count("script")
    assert "img" not in evil.tags


def test_what_rl_did_comes_from_a_run(workdir, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"step": {s}, "phase": "grpo", "accuracy": 0.{s}}}\n' for s in (1, 2))
    )
    write_comparison(workdir, tmp_path / "report.html", command="it", run=run)
    text = " ".join(text_of(Page((tmp_path / "report.html").read_text())).split())
    assert "Training rollouts step 1 step 2 change solved 10.0 % 20.0 % +10.0 points" in text
    assert "children per parent 6.1 8.2 +34.4 %" in text


def test_no_comparison_is_a_message(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run launch/compare\.py first"):
        write_comparison(tmp_path, tmp_path / "report.html", command="it")


def row(method, temperature=1.0, window=512, accuracy=0.5, **more):
    values = {"method": method, "temperature": temperature, "context_window": window, "budget": None}
    values |= {"total_tokens": 100.0, "sequential_tokens": 50.0, "latency_ms": 9.0}
    return {**values, "accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1, **more}


def places(key, rows):
    return {curve.label: [(point.x, point.y) for point in curve.points] for curve in curves_of(key, rows)}


def test_a_curve_is_a_method_along_what_varies():
    rows = [row("adaptive", window=w, accuracy=a, total_tokens=t) for w, a, t in ((256, 0.3, 80.0), (512, 0.6, 99.0))]
    assert places("context_window", rows) == {"adaptive": [(256, 0.3), (512, 0.6)]}
    assert places("total_tokens", rows) == {"adaptive": [(80, 0.3), (99, 0.6)]}
    assert places("num_samples", rows) == {}
    budgets = [row("adaptive", budget=budget) for budget in (None, 4)]
    assert set(places("context_window", budgets)) == {"adaptive", "adaptive, budget 4"}
    assert set(places("total_tokens", budgets)) == {"adaptive"}
    assert set(places("total_tokens", [*rows, row("adaptive", temperature=0.0)])) == {
        "adaptive, temperature 1",
        "adaptive, temperature 0",
    }


@pytest.mark.parametrize(
    ("about", "label"),
    [
        ({}, "shared by all problems"),
        ({"at_once": None}, "shared by all problems"),
        ({"at_once": 1}, "shared by its own threads"),
        ({"at_once": 3}, "shared by 3 problems"),
    ],
)
def test_latencies_say_who_shares_the_lanes(workdir, tmp_path, about, label):
    copied = tmp_path / "comparison"
    shutil.copytree(workdir, copied)
    rows = [{k: v for k, v in row.items() if k != "at_once"} | about for row in read_results(copied)]
    (copied / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_comparison(copied, tmp_path / "report.html", command="it")
    assert f"milliseconds a problem, 4 lanes {label}" in (tmp_path / "report.html").read_text()


def test_several_samples_are_a_curve_over_their_number():
    at_k = {"pass_at_k": [0.4, 0.5, 0.6], "cons_at_k": [0.4, 0.4, 0.5], "tokens_at_k": [10.0, 20.0, 30.0]}
    fewer = {name: values[:2] for name, values in at_k.items()}
    rows = [
        row("serial", accuracy=0.4),
        row("cons@2:serial", accuracy=0.4, num_problems=10, **fewer),
        row("cons@3:serial", accuracy=0.5, num_problems=10, **at_k),
        row("cons@3:serial", accuracy=0.2, num_problems=10, window=256, **at_k),
        row("pass@3:serial", accuracy=0.6, num_problems=10, **at_k),
    ]
    assert places("num_samples", rows) == {
        "cons@n of serial": [(1, 0.4), (2, 0.4), (3, 0.5)],
        "pass@n of serial": [(1, 0.4), (2, 0.5), (3, 0.6)],
    }
    tokens = places("total_tokens", rows)
    assert tokens["pass@n of serial"] == [(10, 0.4), (20, 0.5), (30, 0.6)]
    assert tokens["serial"] == [(100, 0.4)]
    assert places("latency_ms", rows)["cons@3:serial"] == [(9, 0.5), (9, 0.2)]
    (curve,) = curves_of("num_samples", rows[4:])
    low, high = wilson_interval(5, 10)
    assert (curve.points[1].low, curve.points[1].high, curve.points[1].name) == (low, high, "pass@2 of serial")


def test_a_chart_places_points_and_intervals():
    curve = Curve("a & b", (Point(10, 0.5, 0.4, 0.6, "first"), Point(1000, 1.0, 0.9, 1.0, "last")))
    body, height = accuracy_chart("title", "tokens", [curve], width=560, height=330)
    bottom, top = height - 42, height - 330
    interval = re.search(r'interval c0" d="M[\d.]+,([\d.]+)h6m-3,0V([\d.]+)m', body)
    low, high = float(interval[1]), float(interval[2])
    assert low == pytest.approx(bottom + (top - bottom) * 0.4, abs=0.1)
    assert high == pytest.approx(bottom + (top - bottom) * 0.6, abs=0.1)
    assert "first: 50.0 % (40.0 to 60.0) at 10" in body
    assert ">100</text>" in body  # a logarithmic axis marks the middle
    assert "a &amp; b" in body
    with pytest.raises(ValueError, match="no point"):
        accuracy_chart("title", "tokens", [])
    with pytest.raises(ValueError, match="one at 0"):
        accuracy_chart("title", "tokens", [Curve("a", (Point(0, 0.5, 0.4, 0.6, "first"),))])
