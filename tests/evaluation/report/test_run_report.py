"""The report: well-formed, self-contained, safe against model text, and useful when parts of a run are missing."""

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.evaluation.report.charts import Series, line_chart, nice_ticks
from apr_jax.evaluation.report.run_report import pick_rollouts, write_figure, write_report
from apr_jax.evaluation.report.viewer import critical_threads, layout
from apr_jax.evaluation.run import save_rollouts
from configs.grpo import get_config
from tests.evaluation.made_rollouts import evaluated

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def evaluation():
    return evaluated("adaptive", keep=4)


@pytest.fixture
def workdir(tmp_path, evaluation):
    summary, records = evaluation
    (tmp_path / "config.json").write_text(json.dumps(to_dict(from_config_dict(get_config()))))
    (tmp_path / "summary.json").write_text(json.dumps({"before": summary, "after": summary, "after_sampled": summary}))
    save_rollouts(tmp_path / "rollouts.jsonl", {"before": records, "after": records})
    steps = [{"step": step, "phase": "sft", "loss": 1 / step, "validation_loss": 1.1 / step} for step in range(1, 40)]
    steps += [{"step": s, "phase": "grpo", "accuracy": 0.1 * s, "malformed_rate": 0.0, "kl": 0.0} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return tmp_path


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects what a browser would load or run."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.data = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append((self.open[-1] if self.open else "", data))


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def text_of(page):
    return " ".join(data for tag, data in page.data if tag not in ("script", "style"))


def test_a_whole_run(workdir, evaluation):
    page = page_of(workdir)
    text = text_of(page)
    for expected in (
        "Held-out problems solved",
        "What RL did",
        "Training rollouts",
        "steps 7 to 8",
        "before",
        "after, sampled",
        "Threads over time",
        "SFT: loss per token",
    ):
        assert expected in text
    assert f"{100 * evaluation[0]['accuracy']:.1f} %" in text
    assert "GRPO: entropy" not in text  # not logged, so no panel
    assert page.tags.count("svg") == 8 + 4  # four rollouts before, four after; four panels have data


def test_nothing_is_loaded_from_elsewhere(workdir):
    source = write_report(workdir).read_text()
    page = Page(source)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "srcset", "action")]
    assert not re.search(r"@import|url\(", source)
    urls = set(re.findall(r"https?://[^\s\"'<>]+", source))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches


def test_light_and_dark(workdir):
    source = write_report(workdir).read_text()
    (style,) = re.findall(r'<style id="dark" media="\(prefers-color-scheme: dark\)">(.*?)</style>', source, re.S)
    light = source[: source.index('<style id="dark"')]
    for variable in re.findall(r"--[a-z0-9]+(?=:)", light):  # radii and the like are none
        assert f"{variable}:" in style
    write_figure(workdir, workdir / "figure.svg")
    assert '<style media="(prefers-color-scheme: dark)">' in (workdir / "figure.svg").read_text()


def test_model_text_is_data(workdir):
    lines = (workdir / "rollouts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["verdict"] = record["label"] = EVIL
        for call in record["calls"]:
            call["text"] = call["context"] = call["stop"] = EVIL
            call["tokens"], call["logprobs"] = [EVIL], [-1.0]
        for thread in record["threads"]:
            thread["result"] = EVIL
    (workdir / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").write_text(json.dumps({EVIL: summary["after"] | {"failures": {EVIL: 3}}}))
    page = page_of(workdir)
    assert page.tags.count("script") == 3  # the theme, the viewer and its data
    assert "img" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    (embedded,) = [data for tag, data in page.data if tag == "script" and data.startswith("{")]
    assert json.loads(embedded)["tokens"] == [EVIL]
    assert json.loads(embedded)["rollouts"][0]["threads"][0]["calls"][0]["context"] == EVIL
    write_figure(workdir, workdir / "figure.svg")
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(workdir / "figure.svg").iter()}
    assert not tags & {"script", "img"}


@pytest.mark.parametrize(
    "missing",
    [
        ["summary.json"],
        ["rollouts.jsonl"],
        ["metrics.jsonl"],
        ["config.json"],
        ["summary.json", "rollouts.jsonl"],
        ["summary.json", "rollouts.jsonl", "metrics.jsonl", "config.json"],
    ],
)
def test_parts_may_be_missing(workdir, missing):
    for name in missing:
        (workdir / name).unlink()
    text = text_of(page_of(workdir))
    assert ("Held-out problems solved" in text) == ("summary.json" not in missing)
    assert ("Threads over time" in text) == ("rollouts.jsonl" not in missing)
    assert ("Training" in text) == ("metrics.jsonl" not in missing)
    assert ("written nothing yet" in text) == (len(missing) == 4)


def test_the_last_of_a_repeated_step_is_drawn_and_a_torn_line_is_not(workdir):
    assert "train, step 39: 0.02564" in text_of(page_of(workdir))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "phase": "sft", "loss": 0.5}\n{"step": 40, "pha')
    text = text_of(page_of(workdir))
    assert re.findall(r"train, step (?:39|40): \S+", text) == ["train, step 39: 0.5"]


def test_no_folder():
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report("/nowhere/at/all")


def test_figure_is_one_svg(workdir):
    write_figure(workdir, workdir / "figure.svg")
    root = ElementTree.parse(workdir / "figure.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert "critical path" in texts
    assert "SFT: loss per token" in texts
    with pytest.raises(ValueError, match=r"\.svg"):
        write_figure(workdir, workdir / "figure.png")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (workdir / name).unlink()
    with pytest.raises(ValueError, match="neither"):
        write_figure(workdir, workdir / "figure.svg")


def call(path, start, tokens, stop="token"):
    return {"path": path, "clock_start": start, "num_tokens": tokens, "stop": stop}


def test_layout_and_critical_path():
    calls = [
        call([], 0, 50),
        call([], 90, 20),
        call([0, 0], 50, 10),
        call([0, 0], 80, 10),
        call([0, 0, 0, 0], 60, 20),
        call([0, 0, 0, 1], 60, 5),
        call([0, 1], 50, 30),
    ]
    assert critical_threads(calls) == {(), (0, 0), (0, 0, 0, 0)}
    bars = layout(calls)
    assert [bar.row for bar in bars] == [0, 0, 1, 1, 2, 3, 4]
    assert [(bar.begin, bar.end) for bar in bars[:3]] == [(0, 50), (90, 110), (50, 60)]
    critical = sum(bar.end - bar.begin for bar in bars if bar.critical)
    assert critical == 50 + 20 + 10 + 10 + 20 == bars[1].end


def test_the_critical_path_runs_through_the_child_that_cancelled_the_others():
    calls = [call([], 0, 5), call([], 15, 5), call([0, 0], 5, 10, "cancelled"), call([0, 1], 5, 10)]
    assert critical_threads(calls) == {(), (0, 1)}


def test_real_critical_paths_add_up_to_sequential_tokens(evaluation):
    for record in evaluation[1][:4]:
        bars = layout(record["calls"])
        assert sum(bar.end - bar.begin for bar in bars if bar.critical) == record["sequential_tokens"]


def test_the_most_telling_rollout_comes_first():
    def record(label, correct, children):
        return {"label": label, "correct": correct, "num_children": children, "calls": [1]}

    records = [
        record("before", True, 8),
        record("after", False, 8),
        record("after", True, 20),
        record("after", True, 7),
        {**record("after", True, 8), "calls": []},
    ]
    picked = pick_rollouts(records)
    assert [(r["label"], r["correct"], r["num_children"]) for r in picked] == [
        ("after", True, 7),
        ("after", True, 20),
        ("before", True, 8),
        ("after", False, 8),
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.41), (3, 8000), (-2, 5)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert nice_ticks(2.0, 2.0, 4) == [2.0]


def test_charts_leave_out_what_is_not_finite():
    body = line_chart("t <&>", [Series("a", [1, 2, 3], [1.0, float("nan"), 2.0])])
    assert body.count("<circle") == 2
    assert "t &lt;&amp;&gt;" in body
    assert ElementTree.fromstring(f"<g>{body}</g>") is not None
    long = line_chart("long", [Series("a", list(range(5000)), [0.5] * 5000)])
    assert long.count("<circle") <= 240
    with pytest.raises(ValueError, match="no finite value"):
        line_chart("t", [Series("a", [1], [float("inf")])])
