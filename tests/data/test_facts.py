"""Facts: right, within the bound, loss on results alone, the share that was asked for, mixed in and resumable."""

import collections
import dataclasses
import random
import re

import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.data.facts import FACTS_A_SEQUENCE, Facts
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import TaskLacksError
from apr_jax.tasks.countdown.facts import draw_fact
from apr_jax.tasks.countdown.rules import operations
from tests.tasks.settings import REFERENCE, SMALL_DATA

TOKENIZER = BuiltinTokenizer()
COUNTDOWN = TASKS["countdown"]
ROW_LEN = 512
BOUNDED = dataclasses.replace(REFERENCE, max_result=255)


def make_facts(task, **changes):
    return Facts(COUNTDOWN, task, TOKENIZER, **(dict(seed=0, num_sequences=3, row_len=ROW_LEN) | changes))


@pytest.mark.parametrize("task", [BOUNDED, REFERENCE])
def test_facts_are_right_and_within_the_bound(task):
    rng = random.Random(0)
    seen = set()
    for _ in range(3_000):
        asked, rest = draw_fact(rng, task)
        operator = next(char for char in asked if char in "+-*/,")
        left, right = map(int, asked.removesuffix("=").split(operator))
        if operator == ",":
            assert rest == (" equal: Goal Reached" if left == right else " unequal: No Solution")
            assert task.min_target <= right <= task.max_target
            result = left
            seen.add(rest)
        else:
            result = int(rest)
            assert (result, f"{asked}{result}") in operations(left, right)
        assert 0 <= result <= (task.max_result or task.max_number**2)
        seen.add(operator)
    assert seen == {*"+-*/,", " equal: Goal Reached", " unequal: No Solution"}


def test_with_attempts_products_go_beyond_the_bound_and_quotients_are_divisions():
    """As in a search that writes them all: half of the products are within the bound, half of the divisions exact."""
    attempting = dataclasses.replace(REFERENCE, max_result=255, heuristic="none", shuffle=False, attempts=True)
    rng = random.Random(0)
    without, all_of = collections.Counter(), collections.Counter()
    for _ in range(4_000):
        asked, rest = draw_fact(rng, attempting)
        match = re.fullmatch(r"(\d+)([-+*/])(\d+)", asked)
        if match is None:
            continue
        left, operator, right = int(match[1]), match[2], int(match[3])
        results = [result for result, text in operations(left, right) if text.startswith(f"{asked}=")]
        if operator != "/":
            assert rest == "".join(f"={result}" for result in results if result <= 255)
            without[operator] += not rest
        elif right:
            factor = int(re.match(rf", {right}\*(\d+)=", rest)[1])
            product = right * factor
            assert rest.endswith(f"={product},{left}" if product == left else f",{left} unequal: No Solution")
            assert product <= left < product + right
            assert (product == left) == bool(results)
            without["/"] += product != left
        else:
            assert not rest
        assert operator in "+*" or left >= right
        all_of[operator] += 1
    shares = {operator: without[operator] / all_of[operator] for operator in "+-*/"}
    assert shares == pytest.approx({"+": 0.2, "-": 0, "*": 0.49, "/": 0.47}, abs=0.06)


def test_sums_and_differences_are_of_any_two_numbers_that_a_search_meets():
    """Ask for differences of two results, above the numbers of a problem, and for small ones: the unseen is guessed."""
    rng = random.Random(0)
    pairs = []
    while len(pairs) < 3_000:
        asked, _ = draw_fact(rng, BOUNDED)
        if asked[-1] == "=" and "-" in asked:
            pairs.append(tuple(map(int, asked[:-1].split("-"))))
    assert sum(right > BOUNDED.max_number for _, right in pairs) > 0.1 * len(pairs)
    assert sum(left - right <= 3 for left, right in pairs) > 0.2 * len(pairs)
    assert sum(left <= BOUNDED.max_number for left, _ in pairs) > 0.3 * len(pairs)
    assert max(left for left, _ in pairs) <= 255


def test_only_results_have_loss():
    sequence = make_facts(REFERENCE, num_sequences=4)[3]
    text = TOKENIZER.decode([*sequence["tokens"], sequence["targets"][-1]])
    learnt = TOKENIZER.decode(sequence["targets"][sequence["weights"] > 0])
    given = re.compile(r"^(\d+[-+*/]\d+=|\d+,\d+)", re.M)
    assert learnt == given.sub("", text)
    assert "equal" in learnt
    assert text.count("\n") == FACTS_A_SEQUENCE


def test_facts_are_a_function_of_seed_and_index():
    first, again, other = (make_facts(BOUNDED, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[2]["tokens"], again[2]["tokens"])
    assert not np.array_equal(first[2]["tokens"], first[1]["tokens"])
    assert not np.array_equal(first[2]["tokens"], other[2]["tokens"])
    with pytest.raises(IndexError):
        first[3]


def test_a_short_row_holds_whole_facts():
    sequence = make_facts(BOUNDED, row_len=40)[0]
    text = TOKENIZER.decode(sequence["targets"])
    tokens = sum(4 if "," in line else 6 for line in text.splitlines())  # BOS is the first input
    assert len(sequence["tokens"]) == tokens > 40 - 6
    assert TOKENIZER.decode(sequence["targets"]).endswith("\n")


def test_the_share_is_of_all_tokens():
    facts = Facts.of_share(0.2, 100_000, COUNTDOWN, BOUNDED, TOKENIZER, seed=0, row_len=ROW_LEN)
    tokens = sum(len(sequence["tokens"]) for sequence in facts)
    assert tokens / (tokens + 100_000) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_no_demonstrations_is_refused(share):
    with pytest.raises(ConfigError, match=r"data.facts_share"):
        dataclasses.replace(SMALL_DATA, facts_share=share)


def test_a_task_without_facts_is_refused():
    with pytest.raises(TaskLacksError, match=r"'nested_sums' has no bare facts to learn; set data\.facts_share=0"):
        TASKS["nested_sums"].draw_fact(random.Random(0), None)
