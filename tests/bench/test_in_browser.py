"""The thread viewer as people use it, in a real browser: pointer, keyboard, side by side, light and dark, offline."""

import json
import re

import pytest

from apr_jax.bench.browser import NoBrowserError, chromium, take_pictures
from apr_jax.evaluation.report.comparison_report import write_comparison
from apr_jax.evaluation.report.run_report import pick_rollouts, write_report
from apr_jax.evaluation.run import save_rollouts
from tests.evaluation.made_rollouts import evaluated, logprob, made_comparison

pytestmark = pytest.mark.browser
EVIL = '</script><script>document.title = "evil"</script><img src=x onerror="document.title=1">'
MINUS = "\N{MINUS SIGN}"
LIGHT, DARK = "rgb(246, 247, 249)", "rgb(13, 16, 20)"


@pytest.fixture(scope="session")
def browser():
    try:
        with chromium() as browser:
            yield browser
    except NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def records():
    """Of two methods on the same problems, in the order in which the page has them."""
    labelled = [{**record, "label": method} for method in ("serial", "adaptive") for record in evaluated(method)[1][:8]]
    picked = pick_rollouts(labelled)
    adaptive = [record for record in picked if record["label"] == "adaptive"]
    of_serial = {_problem(record): record for record in picked if record["label"] == "serial"}
    return {"adaptive": adaptive, "serial": [of_serial[_problem(record)] for record in adaptive]}


def _problem(record):
    return *record["numbers"], record["target"]


@pytest.fixture(scope="module")
def report(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("run")
    save_rollouts(folder / "rollouts.jsonl", records)
    learnt = json.loads(json.dumps(records["adaptive"][0]))
    for call in learnt["calls"]:
        call["advantage"] = -0.625
    learnt["calls"][0]["tokens"][0] = learnt["calls"][0]["context"] = EVIL
    (folder / "grpo_rollouts").mkdir()
    (folder / "grpo_rollouts" / "3.jsonl").write_text(json.dumps(learnt) + "\n")
    return write_report(folder)


@pytest.fixture
def page(browser, report):
    """The page in a browser without a network; its complaints and requests must be none."""
    context = browser.new_context(offline=True, color_scheme="light", viewport={"width": 1500, "height": 1000})
    page = context.new_page()
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(report.as_uri())
    page.select_option("#left", "adaptive")
    yield page
    assert page.complaints == []
    assert page.requests == [report.as_uri()]
    assert "evil" not in page.title()
    context.close()


def texts(page, side="left"):
    return page.locator(f".pane[data-side={side}] .text .token").all_text_contents()


def written(record, path):
    return "".join(call["text"] for call in record["calls"] if call["path"] == path)


def shown_rollout(page):
    return int(page.input_value("#rollout"))


def test_a_click_on_a_thread_shows_what_it_wrote(page, records):
    record = records["adaptive"][shown_rollout(page)]
    assert "".join(texts(page)).replace("⟨end⟩", "") == written(record, [])
    paths = sorted({tuple(call["path"]) for call in record["calls"]})
    for number, path in enumerate(paths[1:], start=1):
        index = next(i for i, call in enumerate(record["calls"]) if tuple(call["path"]) == path)
        page.click(f".pane[data-side=left] .call[data-call='{index}'] rect")
        assert "".join(texts(page)).replace("⟨end⟩", "") == written(record, list(path))
        assert page.inner_text(".pane[data-side=left] .thread").startswith(f"child {path[0] + 1}.{path[1] + 1}: ")
        assert page.locator(".pane[data-side=left] .call.chosen").count() == 1
        context = page.text_content(".pane[data-side=left] .text .context")
        assert context == next(call["context"] for call in record["calls"] if tuple(call["path"]) == path)
        if number == 2:
            break


def test_pointing_at_a_token_tells_its_log_probability_and_colour(page):
    tokens = page.locator(".pane[data-side=left] .text .call:first-child .token")
    places = range(12)
    surprising = max(places, key=lambda place: -logprob(place))
    tokens.nth(surprising).hover()
    told = page.inner_text(".pane[data-side=left] .value")
    value = logprob(surprising)
    assert f"log-probability {MINUS}{-value:.3f}" in told
    assert "advantage" not in told  # it was not trained on
    for place in places:
        level = sum(-logprob(place) >= least for least in (0.05, 0.25, 0.7, 1.5, 3))
        assert f"s{level}" in tokens.nth(place).get_attribute("class").split()
    background = "node => getComputedStyle(node).backgroundColor"
    likely = min(places, key=lambda place: -logprob(place))
    assert tokens.nth(surprising).evaluate(background) != tokens.nth(likely).evaluate(background)


def test_tokens_are_read_by_keyboard_too(page):
    page.focus(".pane[data-side=left] .text")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    told = page.inner_text(".pane[data-side=left] .value")
    assert f"log-probability {MINUS}{-logprob(1):.3f}" in told
    assert page.locator(".pane[data-side=left] .token.current").count() == 1
    assert page.inner_text(".pane[data-side=left] .token.current") in told


def test_what_training_learnt_from_shows_its_advantage(page):
    page.select_option("#left", "GRPO step 3")
    assert f"advantage {MINUS}0.625" in page.inner_text(".pane[data-side=left] .text .note >> nth=0")
    assert texts(page)[0] == EVIL  # text of a model is text
    page.locator(".pane[data-side=left] .text .token").nth(1).hover()
    assert f"advantage {MINUS}0.625" in page.inner_text(".pane[data-side=left] .value")


def test_failed_ones_are_found(page, records):
    failed = [index for index, record in enumerate(records["adaptive"]) if not record["correct"]]
    assert len(failed) >= 2, "the made rollouts hold failures"
    seen = []
    for _ in range(len(failed) + 1):
        page.click("#next-failed")
        seen.append(shown_rollout(page))
    assert sorted(seen[:-1]) == failed
    assert seen[-1] == seen[0]  # round the end
    assert "✗" in page.inner_text("#rollout option:checked")
    page.keyboard.press("F")
    assert shown_rollout(page) == seen[-2]
    page.keyboard.press("f")
    assert shown_rollout(page) == seen[-1]


def test_a_filter_leaves_one_verdict(page, records):
    page.select_option("#filter", "failed")
    assert page.locator("#rollout option").count() == sum(not record["correct"] for record in records["adaptive"])
    page.select_option("#filter", "=no solution")
    names = page.locator("#rollout option").all_text_contents()
    assert names
    assert all("no solution" in name for name in names)
    page.select_option("#filter", "")
    assert page.locator("#rollout option").count() == 8
    assert re.search(r"of 8, \d failed", page.inner_text("#count"))


def test_next_and_previous_problem(page):
    page.keyboard.press("n")
    page.keyboard.press("n")
    assert shown_rollout(page) == 2
    page.click("#previous")
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert shown_rollout(page) == 7  # round the beginning


def test_two_methods_side_by_side_on_one_problem(page, records):
    page.keyboard.press("n")
    assert not page.is_visible(".pane[data-side=right]")
    page.select_option("#right", "serial")
    number = shown_rollout(page)
    assert "".join(texts(page, "left")).replace("⟨end⟩", "") == written(records["adaptive"][number], [])
    assert "".join(texts(page, "right")).replace("⟨end⟩", "") == written(records["serial"][number], [])
    left, right = (page.locator(f".pane[data-side={side}]").bounding_box() for side in ("left", "right"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    page.keyboard.press("n")  # both go on
    assert "".join(texts(page, "right")).replace("⟨end⟩", "") == written(records["serial"][number + 1], [])
    page.select_option("#right", "GRPO step 3")
    assert "not kept" in page.inner_text(".pane[data-side=right]")
    page.focus(".pane[data-side=right] .text")
    page.keyboard.press("ArrowRight")  # no token to go to, and no complaint (the fixture looks)
    page.keyboard.press("c")
    assert not page.is_visible(".pane[data-side=right]")


def test_threads_are_chosen_by_keyboard(page):
    page.focus(".pane[data-side=left] .call[tabindex='0']")
    names = []
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "End", "Home"):
        page.keyboard.press(key)
        names.append(page.inner_text(".pane[data-side=left] .thread").split(":")[0])
    count = page.locator(".pane[data-side=left] .call").count()
    assert names[:3] == ["child 1.1", "child 1.2", "child 1.1"]
    assert names[3] not in ("parent", "child 1.1")
    assert names[4] == "parent"
    assert count > len(set(names))
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def colours(page):
    script = "([selector, property]) => getComputedStyle(document.querySelector(selector))[property]"
    return page.evaluate(script, ["body", "backgroundColor"]), page.evaluate(script, ["svg .bar.root", "fill"])


def test_light_and_dark(page):
    assert colours(page) == (LIGHT, "rgb(47, 111, 222)")
    page.emulate_media(color_scheme="dark")
    assert colours(page) == (DARK, "rgb(91, 147, 245)")
    page.click("#theme")
    assert colours(page)[0] == LIGHT
    page.keyboard.press("t")
    assert colours(page)[0] == DARK
    page.emulate_media(color_scheme="light")
    assert colours(page)[0] == DARK  # chosen by hand
    assert page.inner_text("#theme") == "Light"


def test_a_narrow_screen_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 420, "height": 800})
    page.keyboard.press("c")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_comparison_opens_offline_with_its_figures(browser, tmp_path):
    made_comparison(tmp_path)
    write_comparison(tmp_path, tmp_path / "report.html", command="it")
    context = browser.new_context(offline=True, viewport={"width": 1300, "height": 900})
    page, requests, complaints = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("#figures svg").count() == 9
    page.click("#total-tokens summary")
    assert page.is_visible("#total-tokens table")
    page.keyboard.press("c")
    both = [page.inner_text(f".pane[data-side={side}] .about") for side in ("left", "right")]
    assert both[0].split(": ")[1] == both[1].split(": ")[1]  # the same problem
    assert both[0].split(": ")[0] != both[1].split(": ")[0]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert (requests, complaints) == ([(tmp_path / "report.html").as_uri()], [])
    context.close()


def test_pictures_for_the_readme(browser, tmp_path):
    made_comparison(tmp_path, windows=(400,))
    write_comparison(tmp_path, tmp_path / "report.html", command="it")
    made = take_pictures(browser, tmp_path / "report.html", tmp_path / "pictures")
    assert [path.name for path in made] == [
        *("figures.png", "context_window.png", "sequential_tokens.png", "threads.png", "side_by_side.png")
    ]
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert 10_000 < path.stat().st_size < 200_000
