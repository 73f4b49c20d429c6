"""Which rows and cells a command line asks for, and what it is told where it asks for nothing sensible."""

import pytest

from apr_jax.config import ConfigError
from apr_jax.evaluation.compare.grid import Row, make_cells, read_policies, read_rows

METHODS = {"before": "adaptive", "after": "adaptive", "sos": "serial"}
WINDOWS = {"before": 512, "after": 512, "sos": 256}


def test_policies_have_a_name_and_a_folder_each():
    assert read_policies(["a=runs/a", "b=runs/b=2"]) == {"a": "runs/a", "b": "runs/b=2"}
    for wrong in (["runs/a"], ["=runs/a"], ["a="], ["a/b=runs/a"], ["a@2=runs/a"], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="--policies"):
            read_policies(wrong)


@pytest.mark.parametrize(
    ("item", "program", "policy"),
    [
        ("after", "adaptive", "after"),  # a policy's name: what it was trained for
        ("sos", "serial", "sos"),
        ("serial", "serial", "sos"),  # a way of reasoning: the only policy of it
        ("cons@8:before", "cons@8:adaptive", "before"),
        ("pass@8:serial", "pass@8:serial", "sos"),
        ("best@2:pass@3:serial", "best@2:pass@3:serial", "sos"),
        ("hogwild/sos", "hogwild", "sos"),  # a way that the policy was not trained for
        ("cons@2:adaptive/after", "cons@2:adaptive", "after"),
    ],
)
def test_a_row_is_a_program_with_a_policy(item, program, policy):
    assert read_rows([item], METHODS) == [Row(item, program, policy)]


def test_a_row_knows_what_its_wrappers_sample():
    (row,) = read_rows(["best@2:pass@3:serial"], METHODS)
    assert (row.inner, row.num_samples) == ("serial", 6)
    (row,) = read_rows(["hogwild/sos"], METHODS)
    assert (row.inner, row.num_samples) == ("hogwild", 1)


def test_without_rows_each_policy_reasons_as_it_was_trained_to():
    assert [(row.label, row.program) for row in read_rows([], METHODS)] == [
        ("before", "adaptive"),
        ("after", "adaptive"),
        ("sos", "serial"),
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["adaptive"], "which policy.*adaptive/before, adaptive/after"),
        (["pasta"], "no policy is named pasta or was trained for it"),
        (["adaptive/nobody"], "no policy is named nobody"),
        (["cons@0:sos"], "takes PROGRAM"),
        (["cons:sos"], "takes PROGRAM"),
        ([""], "takes PROGRAM"),
        (["sos", "sos"], "twice"),
    ],
)
def test_what_is_no_row_is_refused(items, message):
    with pytest.raises(ConfigError, match=message):
        read_rows(items, METHODS)


def cells_of(rows, budgets=(), temperatures=(0.0,), windows=()):
    cells = make_cells(read_rows(rows, METHODS), budgets, temperatures, windows, WINDOWS)
    return [(c.row.label, c.budget, c.temperature, c.context_window) for c in cells]


def test_every_row_at_every_setting():
    assert cells_of(["after", "sos"]) == [("after", None, 0.0, 512), ("sos", None, 0.0, 256)]
    assert cells_of(["after", "sos"], ["4"], [0.0, 1.0], [128, 256]) == [
        (row, 4, temperature, window) for row in ("after", "sos") for window in (128, 256) for temperature in (0.0, 1.0)
    ]


def test_a_setting_that_is_named_twice_is_run_once():
    once = cells_of(["after"], ["4", "none"], [0.0, 1.0], [128, 256])
    assert len(once) == 8
    assert cells_of(["after"], ["4", "none", "after=4"], [0.0, 1.0, 0.0], [128, 256, 128]) == once


def test_budgets_may_be_of_one_row():
    assert cells_of(["after", "sos"], ["none", "after=4", "after=8"]) == [
        ("after", None, 0.0, 512),
        ("after", 4, 0.0, 512),
        ("after", 8, 0.0, 512),
        ("sos", None, 0.0, 256),
    ]
    for wrong in ("0", "x", "after=", "nobody=3"):
        with pytest.raises(ConfigError, match="--budgets"):
            cells_of(["after"], [wrong])


def test_equal_samples_are_drawn_once():
    assert cells_of(["sos", "cons@4:sos", "cons@1:sos"], temperatures=[0.0, 0.5]) == [
        ("sos", None, 0.0, 256),
        ("sos", None, 0.5, 256),
        ("cons@4:sos", None, 0.5, 256),
        ("cons@1:sos", None, 0.0, 256),
        ("cons@1:sos", None, 0.5, 256),
    ]
    assert cells_of(["pass@1:cons@8:sos"], temperatures=[0.0, 0.5]) == [("pass@1:cons@8:sos", None, 0.5, 256)]
    with pytest.raises(ConfigError, match="temperature above 0"):
        cells_of(["pass@4:sos"])
