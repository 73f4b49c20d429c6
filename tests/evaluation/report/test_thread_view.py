"""What the thread viewer is given: every token once, with what came into and went out of its thread's context."""

import pytest

from apr_jax.evaluation.report.thread_view import ThreadViews
from tests.evaluation.made_rollouts import evaluated, logprob


@pytest.fixture(scope="module")
def records():
    _, records = evaluated("adaptive")
    return records


def shown(records):
    views = ThreadViews()
    for record in records:
        views.add("adaptive", record)
    return views, views.data


def test_a_thread_reads_as_it_was_written(records):
    views, data = shown(records)
    assert len(views) == len(views.svgs) == len(data["rollouts"]) == 8  # those with calls
    texts = data["tokens"]
    assert len(set(texts)) == len(texts)
    for record, rollout in zip(records, data["rollouts"], strict=False):
        paths = sorted({tuple(call["path"]) for call in record["calls"]})
        assert rollout["threads"][0]["name"] == "parent"
        for path, thread in zip(paths, rollout["threads"], strict=True):
            text = ""
            own = [call for call in record["calls"] if tuple(call["path"]) == path]
            for call, view in zip(own, thread["calls"], strict=True):
                text += view["context"]
                assert text == call["context"]  # what was kept of the last call, and what came
                assert record["calls"][view["index"]] is call
                written = [texts[token] for token in view["tokens"]]
                assert "".join(written).removesuffix("⟨end⟩") == call["text"]
                assert view["logprobs"] == [logprob(place) for place in range(len(written))]
                text += "".join(written[: view["kept"]])


def test_what_a_join_replaced_is_marked(records):
    _, data = shown(records)
    parent = data["rollouts"][0]["threads"][0]
    first, second = parent["calls"][:2]
    gone = "".join(data["tokens"][token] for token in first["tokens"][first["kept"] :])
    assert gone.startswith("<Calling Sub Searches>\n")
    assert gone.endswith("<End Calling Sub Searches>\n")
    assert second["context"].startswith("<Sub Searches>\n")
    last = parent["calls"][-1]
    assert last["kept"] == len(last["tokens"])


def test_rollouts_of_one_problem_have_one_key(records):
    views = ThreadViews()
    for label, sample in (("a", 0), ("b", 0), ("b", 1)):
        views.add(label, {**records[0], "sample": sample})
    views.add("a", records[1])
    keys = [rollout["key"] for rollout in views.data["rollouts"]]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_records_without_tokens_are_shown_by_the_line(records):
    old = {
        **records[0],
        "calls": [{k: v for k, v in c.items() if k not in ("tokens", "logprobs")} for c in records[0]["calls"]],
    }
    _, data = shown([old])
    call = data["rollouts"][0]["threads"][0]["calls"][0]
    assert call["logprobs"] is None
    assert "".join(data["tokens"][token] for token in call["tokens"]) == old["calls"][0]["text"]


def test_records_without_calls_are_left_out(records):
    views, data = shown([records[-1]])
    assert "calls" not in records[-1]
    assert not len(views)
    assert not data["rollouts"]
