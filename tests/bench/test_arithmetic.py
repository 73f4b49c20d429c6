"""The probe finds every result, and a policy's figures are those of its own most likely tokens."""

import collections
import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.bench.arithmetic import Share, find_results, probe_arithmetic, token_kinds
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.model.params import graphdef, init_params
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import make_mesh
from apr_jax.tasks.countdown.judging import count_operations
from apr_jax.tasks.countdown.rules import sample_problem
from apr_jax.tasks.generation import demonstrate
from tests.tasks.settings import LAPTOP
from tests.train.small import small_config

TOKENIZER = BuiltinTokenizer()
CONFIG = small_config()
MODEL = dataclasses.replace(CONFIG.model, max_seq_len=512)


def _demonstrations(count):
    rng = random.Random(0)
    return [demonstrate(sample_problem(rng, LAPTOP), rng, LAPTOP, "adaptive", False) for _ in range(count)]


def _texts(text):
    return TOKENIZER.token_texts(TOKENIZER.encode(text))


def test_results_of_one_and_of_several_tokens_are_found():
    lines = ["31-26=5, Resulting Numbers: [5]", "20*300=6000, Resulting Numbers: [6000]"]
    texts = _texts("".join(f"Exploring Operation: {line}\n" for line in lines))
    first, second = find_results(texts)
    assert (first.operator, first.larger_operand, texts[first.start : first.stop]) == ("-", 31, ["5"])
    assert (second.operator, second.larger_operand, texts[second.start : second.stop]) == ("*", 300, [*"6000"])


def test_an_attempt_has_no_result():
    lines = ["57*20", "57/19, 19*3=57,57", "57/19=3, Resulting Numbers: [3]"]
    texts = _texts("".join(f"Exploring Operation: {line}\n" for line in lines))
    (found,) = find_results(texts)
    assert (found.operator, found.larger_operand, texts[found.start : found.stop]) == ("/", 57, ["3"])


def test_a_line_that_is_cut_off_has_no_result():
    for cut in ("Exploring Operation: 31", "Exploring Operation: 31-26=", "Exploring Operation: 31-26=5"):
        assert find_results(_texts(cut)) == []


def test_a_result_knows_its_line():
    operation = "Exploring Operation: 4+6=10, Resulting Numbers: [10]\n"
    texts = _texts(f"Current State: 24:[4, 6], Operations: []\n{operation}Exploring Operation: 57*20\n{operation}10,24")
    assert ["".join(texts[found.begin : found.end]) for found in find_results(texts)] == [operation, operation]


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("Moving to Node #0,1\n", {"node": 2}),
        ("Current State: 24:[6], Operations: []\n", {"numbers": 4}),
        (
            "Exploring Operation: 4+6=10, Resulting Numbers: [10]\n",
            {"next operation": 3, "+ has a result": 1, "result": 2, "numbers": 2},
        ),
        ("Exploring Operation: 57*20\n", {"next operation": 3, "* has no result": 1}),
        (
            "Exploring Operation: 57/20, 20*2=40,57 unequal: No Solution\n",
            {"next operation": 4, "division": 7, "/ has no result": 1},
        ),
        ("Exploring Operation: 57/19, 19*3=57,57\n", {"next operation": 4, "division": 7, "/ has a result": 1}),
        ("Generated Node #0,1: 24:[10] Operation: 4+6=10\n", {"node": 2, "numbers": 10}),
        ("10,24 unequal: No Solution\n", {"numbers": 2, "outcome": 1}),
        ("<Start Sub Search 0 at level 1> Moving to Node #0,1\n", {"node": 4}),
        ("No solution found.\n", {}),
    ],
)
def test_each_token_says_one_thing(line: str, kinds: dict[str, int]):
    found = token_kinds(_texts(line))
    assert found[0] == "next line"
    assert collections.Counter(found[1:]) == kinds
    assert token_kinds(_texts(line + line)) == found + found


def test_figures_are_of_the_most_likely_tokens():
    more = _demonstrations(40)
    in_vain = next(demonstration for demonstration in more if not demonstration.correct)  # its last call has the list
    demonstrations = [*more[:3], in_vain]
    params = init_params(MODEL, 0)
    probe = probe_arithmetic(params, MODEL, make_mesh(CONFIG.mesh), TOKENIZER, demonstrations)
    shares = probe.results
    model = nnx.merge(graphdef(MODEL), params)
    right = total = tokens = tokens_right = replayed = 0
    for call in (call for demonstration in demonstrations for call in demonstration.calls):
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(call.context + call.completion)]
        given = len(TOKENIZER.encode(call.context))
        hidden, _ = model(jnp.asarray([ids]), training_rows(MODEL, jnp.arange(len(ids))[None]))
        top = np.asarray(jax.device_get(jnp.argmax(model.logits(hidden)[0], axis=-1)))
        ids += [] if call.ends_in_spawn else [TOKENIZER.eos_id]
        tokens += len(ids) - 1 - given
        tokens_right += int(np.sum(top[given : len(ids) - 1] == ids[given + 1 :]))
        replayed += len(TOKENIZER.encode(call.completion[call.replay_start :]))
        for result in find_results(TOKENIZER.token_texts(ids)):
            if result.start > given:
                total += 1
                right += all(top[place - 1] == ids[place] for place in range(result.start, result.stop))
    written = sum(count_operations(call.completion)[0] for item in demonstrations for call in item.calls)
    assert shares["all"] == Share(right, total)
    assert total == written
    assert sum(share.total for share in probe.tokens.values()) == tokens
    assert sum(share.right for share in probe.tokens.values()) == tokens_right
    assert sum(share.total for label, share in probe.tokens.items() if "replay" in label) == replayed > 0
    listed = [
        text.count("Resulting")
        for call in (call for demonstration in demonstrations for call in demonstration.calls)
        if call.depth == 0 and call.replay_start == len(text := call.completion)
    ]
    assert sum(share.total for share in probe.places.values()) == sum(listed) > 0
    assert probe.places["operations  1 to 4"].total == sum(min(4, count) for count in listed)
    of_operators = [share for label, share in shares.items() if label in {*"+-*/"}]
    of_sizes = [share for label, share in shares.items() if " to " in label or "above" in label]
    for shares_of_all in (of_operators, of_sizes):
        assert sum(share.total for share in shares_of_all) == total
