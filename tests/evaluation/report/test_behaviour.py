"""The table of what RL did: figures by hand."""

import pytest

from apr_jax.evaluation.report.behaviour import behaviour_tables


def _summary(accuracy, children):
    return {"accuracy": accuracy, "children_per_rollout": children, "total_tokens": 10_964.0 * children / 6.1}


def _step(step, **figures):
    return {"phase": "grpo", "step": step, **figures}


def _rows(table):
    return {row["label"]: (row["before"], row["after"], row["change"]) for row in table["rows"]}


def test_evaluations_before_and_after():
    summary = {"before": _summary(0.755, 6.1), "before_sampled": _summary(0.5, 0.0), "after": _summary(0.834, 8.2)}
    (table,) = behaviour_tables(summary, [])
    assert (table["title"], table["columns"]) == ("Held-out problems", ("before", "after"))
    assert _rows(table) == {
        "solved": ("75.5 %", "83.4 %", "+7.9 points"),
        "children per rollout": ("6.1", "8.2", "+34.4 %"),
        "tokens, all threads": ("10,964", "14,738", "+34.4 %"),
    }
    titles = [table["title"] for table in behaviour_tables(summary | {"after_sampled": _summary(0.6, 1.0)}, [])]
    assert titles == ["Held-out problems", "Held-out problems, sampled"]


def test_first_and_last_quarter_of_the_steps():
    steps = [_step(s, accuracy=0.1 * s, entropy=1.0, malformed_reasons={"no_call_begin": s}) for s in range(1, 9)]
    steps[-1]["malformed_reasons"] = {"wrong_level": 4}
    sft = {"phase": "sft", "step": 1, "accuracy": 0.9}
    (table,) = behaviour_tables({}, [*steps[::-1], sft])
    assert table["columns"] == ("steps 1 to 2", "steps 7 to 8")
    assert _rows(table) == {
        "solved": ("15.0 %", "75.0 %", "+60.0 points"),
        "entropy per token, nats": ("1", "1", "+0.0 %"),
        "malformed a step: no call begin": ("1.5", "3.5", "+133.3 %"),
        "malformed a step: wrong level": ("0", "2", ""),
    }


@pytest.mark.parametrize("metrics", [[], [_step(1, accuracy=0.5)]])
def test_a_run_without_two_steps_has_no_table(metrics):
    assert behaviour_tables({}, metrics) == []
