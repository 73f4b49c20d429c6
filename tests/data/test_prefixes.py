"""Calls with a common beginning become branches, in which every token has the context that it had alone."""

import numpy as np
import pytest

from apr_jax.data.prefixes import MIN_SHARED, share_prefixes

LONG = MIN_SHARED + 8


def sequence(tokens, first_target):
    """Targets are told from each other by their sequence's first own token."""
    tokens = np.asarray(tokens, np.int32)
    return {"tokens": tokens, "weight": (np.arange(len(tokens)) >= first_target).astype(np.float32)}


def contexts(shared):
    """Of each token, what it sees (positions with tokens), by (call, position) for those that carry weight."""
    seen = {}
    times = np.arange(len(shared["tokens"]))
    for time in times:
        visible = (times <= time) & (time < times + shared["reach"])
        if shared["weight"][time]:
            key = int(shared["call"][time]), int(shared["positions"][time])
            seen[key] = list(zip(shared["positions"][visible], shared["tokens"][visible], strict=True))
    return seen


def random_calls(seed):
    """Calls of a thread: each goes on from somewhere in the last one, or begins anew."""
    rng = np.random.default_rng(seed)
    calls = [(rng.integers(0, 9, LONG), LONG - 1)]
    for _ in range(5):
        last, first_target = calls[-1]
        kept = int(rng.integers(first_target, len(last) + 1)) if rng.random() < 0.8 else 0
        context = np.concatenate([last[:kept], rng.integers(0, 9, rng.integers(1, 5))])
        calls.append((np.concatenate([context, rng.integers(0, 9, rng.integers(0, 6))]), len(context) - 1))
    return calls


@pytest.mark.parametrize("seed", range(30))
def test_every_target_has_the_context_that_it_had_alone(seed):
    calls = random_calls(seed)
    sequences = [sequence(*call) for call in calls]
    firsts = [first for _, first in calls]
    together = share_prefixes(sequences, [0] * len(calls), firsts, 10_000)
    seen = [(number, contexts(shared)) for number, shared in enumerate(together)]
    found = [context for _, of_call in seen for context in of_call.values()]
    expected = [
        list(enumerate(tokens[: place + 1].tolist())) for tokens, first in calls for place in range(first, len(tokens))
    ]
    assert found == expected
    assert sum(len(shared["tokens"]) for shared in together) <= sum(len(tokens) for tokens, _ in calls)


def test_only_what_carries_no_loss_is_shared():
    """Two calls of one context and one text: the second has the whole text, and a copy of the context's last token."""
    tokens = np.arange(LONG)
    (shared,) = share_prefixes([sequence(tokens, LONG - 4)] * 2, [0, 0], [LONG - 4] * 2, 200)
    np.testing.assert_array_equal(shared["tokens"], np.concatenate([tokens, tokens[-4:]]))
    np.testing.assert_array_equal(shared["positions"], np.concatenate([tokens, tokens[-4:]]))
    np.testing.assert_array_equal(shared["call"], [0] * LONG + [1] * 4)
    np.testing.assert_array_equal(shared["reach"][LONG - 5 : LONG - 2], [9, 4, 3])
    assert shared["weight"].sum() == 8


@pytest.mark.parametrize(
    ("second", "families", "most"),
    [
        (np.arange(LONG), [0, 1], 200),  # another family's
        (np.arange(LONG), [0, 0], LONG + 1),  # no room
        (np.r_[np.arange(MIN_SHARED - 1), np.zeros(9)], [0, 0], 200),  # too little in common
    ],
)
def test_others_stay_on_their_own(second, families, most):
    first = sequence(np.arange(LONG), LONG - 4)
    together = share_prefixes([first, sequence(second, LONG - 4)], families, [LONG - 4] * 2, most)
    assert len(together) == 2
    for shared in together:
        np.testing.assert_array_equal(shared["positions"], np.arange(LONG))
        np.testing.assert_array_equal(shared["reach"], LONG - np.arange(LONG))
        assert not shared["call"].any()
