"""The table of claims, from comparisons whose figures are known."""

import json

import pytest

from apr_jax.evaluation.compare.grid import Cell, Row
from apr_jax.evaluation.compare.store import Results
from apr_jax.evaluation.metrics import wilson_interval
from apr_jax.reproduce.claims import claims, table

TOTAL = 100


def _add(workdir, comparison, method, solved, *, budget=None, window=2_048, tokens=100.0, chain=50.0, ms=10.0, **more):
    low, high = wilson_interval(solved, TOTAL)
    figures = {
        "accuracy": solved / TOTAL,
        "accuracy_low": low,
        "accuracy_high": high,
        "total_tokens": tokens,
        "latency_ms": ms,
        **more,
    }
    records = [
        {"correct": i < solved, "sequential_tokens": chain, "total_tokens": tokens, "num_children": 1}
        for i in range(TOTAL)
    ]
    cell = Cell(Row(method, method, method), budget, 0.0, window)
    folder = workdir / "comparisons" / comparison
    Results(folder).add(cell, {"problems": "p", "seed": 0, "engine.lanes": 1, "cell": str(cell)}, figures, records)


def _ours(workdir):
    found = {}
    for claim in claims(workdir):
        found.setdefault(claim.letter, []).append(claim.ours)
    return found


def test_without_results_no_claim_has_figures(tmp_path):
    found = claims(tmp_path)
    assert {claim.ours for claim in found} == {"not run yet"}
    assert [claim.letter for claim in found] == list("aabbcccddddddef---")
    assert table(found).count("\n") == 2 + len(found)


def test_equal_context_compares_at_the_largest_window(tmp_path):
    for window, solved in ((512, 10), (2_048, 80)):
        _add(tmp_path, "windows", "adaptive", solved, window=window)
        _add(tmp_path, "windows", "serial", solved - 5, window=window)
    sft, rl = _ours(tmp_path)["a"]
    assert sft.startswith("80.0 % (71.1 to 86.7) - 75.0 % (65.7 to 82.5) = +5.0 points (+0.7 to +9.3) at 2,048 tokens")
    assert rl == "not run yet"


def test_equal_tokens_finds_where_adaptive_crosses_the_votes(tmp_path):
    for budget, solved, tokens in ((1, 30, 100.0), (2, 60, 200.0), (10, 90, 900.0)):
        _add(tmp_path, "tokens", "adaptive_budget", solved, budget=budget, tokens=tokens)
    ks = {"cons_at_k": [0.5, 0.55, 0.6], "pass_at_k": [0.5, 0.6, 0.7], "tokens_at_k": [90.0, 180.0, 1_800.0]}
    _add(tmp_path, "tokens", "cons@3:serial", 60, tokens=1_800.0, **ks)
    _add(tmp_path, "tokens", "cons@3:direct", 99, tokens=10.0, **ks | {"cons_at_k": [0.99] * 3})
    votes, passes = _ours(tmp_path)["b"]
    assert votes == "90.0 % (82.6 to 94.5) at 900 tokens, votes of serial 55.0 % at most; ahead from 200 tokens"
    assert passes == "pass@3 of serial 70.0 % at 1,800 tokens; adaptive as much with -50.0%"


def test_equal_latency_takes_serials_best_within_adaptives_time(tmp_path):
    _add(tmp_path, "latency_8", "adaptive_rl", 75, ms=100.0)
    for window, solved, ms in ((512, 40, 50.0), (1_024, 50, 99.0), (2_048, 60, 101.0)):
        _add(tmp_path, "latency_8", "serial_rl", solved, window=window, ms=ms)
    one, eight, many = _ours(tmp_path)["c"]
    assert one == many == "not run yet"
    assert "at 100 ms, serial 50.0 % (40.4 to 59.6) at 99 ms = +25.0 points (+16.5 to +33.5)" in eight


def test_reinforcement_is_read_from_the_run(tmp_path):
    folder = tmp_path / "runs" / "adaptive_rl"
    folder.mkdir(parents=True)

    def figures(accuracy, children):
        keys = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
        return keys | {"children_per_rollout": children, "tokens_per_call": 10.0, "sequential_tokens": 0.0}

    (folder / "summary.json").write_text(json.dumps({"before": figures(0.5, 4.0), "after": figures(0.6, 5.0)}))
    solved, children, tokens, chain, *serial = _ours(tmp_path)["d"]
    assert solved == "50.0 % (40.0 to 60.0) to 60.0 % (50.0 to 70.0)"
    assert children == "4.0 to 5.0 (+25.0%)"
    assert (tokens, chain) == ("10.0 to 10.0 (+0.0%)", "0.0 to 0.0")
    assert set(serial) == {"not run yet"}


@pytest.mark.parametrize(("chain", "told"), [(30.0, "-40.0% (-40.0% to -40.0%)"), (60.0, "+20.0% (+20.0% to +20.0%)")])
def test_width_and_the_price_on_the_chain(tmp_path, chain, told):
    _add(tmp_path, "width", "adaptive_budget", 70, budget=10)
    _add(tmp_path, "width", "adaptive_budget_rl", 72, budget=10)
    _add(tmp_path, "path", "adaptive_rl", 80)
    _add(tmp_path, "path", "adaptive_path", 80, chain=chain)
    ours = _ours(tmp_path)
    assert ours["e"] == ["70.0 % (60.4 to 78.1), 72.0 % (62.5 to 79.9): +2.0 points (-0.8 to +4.8)"]
    assert ours["f"] == [f"{told} on the longest chain, accuracy +0.0 points (+0.0 to +0.0)"]


def test_other_methods_stand_beside_serial(tmp_path):
    _add(tmp_path, "windows", "serial", 40, tokens=1_500.0)
    for method, solved, tokens in (("tree_of_thoughts", 90, 3_000.0), ("hogwild", 30, 1_800.0)):
        _add(tmp_path, "methods", method, solved, tokens=tokens)
    thoughts, pasta, hogwild = _ours(tmp_path)["-"]
    assert thoughts == "90.0 % (82.6 to 94.5) at 3,000 tokens, over serial +50.0 points (+40.2 to +59.8)"
    assert pasta == "not run yet"
    assert hogwild == "30.0 % (21.9 to 39.6) at 1,800 tokens, over serial -10.0 points (-15.9 to -4.1)"
