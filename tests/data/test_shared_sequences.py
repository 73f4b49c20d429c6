"""Training sequences of workers on a shared cache hold what each token saw, by the engine test's written-out views."""

import dataclasses

import numpy as np
import pytest

from apr_jax.data.packing import pack
from apr_jax.data.pipeline import SequenceOptions, tokenize, train_iterator, validation_batch
from apr_jax.data.shared_sequences import Segment, SharedCalls, common_prompt, shared_sequence, tokenize_shared
from apr_jax.data.tokenized import LossWeights
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.threads import Call, Stop, StopReason
from tests.engine.group_naive import read_tokens, view_of
from tests.reasoning.fixtures import SMALL, demonstrations

PROMPT = [9, 8, 7]
SEGMENTS = [Segment([1, 2], [3, 4, 5, 6]), Segment([11], [12, 13]), Segment([21, 22, 23], [24])]


def as_calls(prompt, segments):
    return [
        Call(
            (0, number),
            np.array([*prompt, *segment.header], np.int32),
            np.array(segment.written, np.int32),
            np.zeros(len(segment.written), np.float32),
            Stop(StopReason.TOKEN, None),
            0,
            0.0,
            0.0,
            group_prompt=len(prompt),
        )
        for number, segment in enumerate(segments)
    ]


OPTIONS = SequenceOptions(row_len=800, replay_weight=4.0, loss_on_context=False, shares_cache=True)


def test_each_token_sees_what_its_view_holds():
    arrays = shared_sequence(PROMPT, SEGMENTS)
    tokens = read_tokens(as_calls(PROMPT, SEGMENTS))
    assert arrays["tokens"].tolist() == [token.token for token in tokens]
    assert arrays["workers"].tolist() == [0 if token.worker is None else 1 + token.worker for token in tokens]
    assert arrays["places"].tolist() == [0 if t.worker is None else t.place for t in tokens]
    for index, token in enumerate(tokens):
        view = [tokens[i] for i in view_of(token, tokens)]
        for worker in range(3):
            if worker != token.worker:
                assert arrays["seen"][index, worker] == sum(each.worker == worker for each in view)
        own = [each for each in view if each.worker in (None, token.worker)]
        assert arrays["positions"][index] == len(own) - 1


def test_targets_are_what_workers_wrote():
    arrays = shared_sequence(PROMPT, SEGMENTS)
    assert arrays["targets"][arrays["written"] > 0].tolist() == [3, 4, 5, 6, 12, 13, 24]
    assert {len(array) for array in arrays.values()} == {3 + 5 + 2 + 3}


def test_packing_keeps_the_workers_positions():
    arrays = shared_sequence(PROMPT, SEGMENTS)
    packing = pack([arrays, arrays], row_len=40)
    for read in packing.read_back(packing.rows["positions"]):
        assert read.tolist() == arrays["positions"].tolist()
    assert packing.rows["seen"].shape == (1, 40, 3)


def test_demonstrations_become_one_sequence_each_with_the_replay_weighed():
    tokenizer = load_tokenizer("builtin")
    demos = list(demonstrations(SMALL, "hogwild", 6))
    calls = SharedCalls(tokenize_shared(demos, tokenizer, row_len=1000))
    assert len(calls) == 6
    assert calls.num_dropped == 0
    for index, demo in enumerate(demos):
        sequence = calls.sequence(index, LossWeights(4.0, False, tokenizer.join_ids))
        assert len(sequence["tokens"]) == calls.lengths[index]
        learnt = sequence["targets"][sequence["weights"] > 0]
        assert tokenizer.decode(learnt.tolist()) == "".join(call.completion for call in demo.calls)
        replayed = sequence["targets"][sequence["weights"] == 4.0]
        assert tokenizer.decode(replayed.tolist()) == "".join(c.completion[c.replay_start :] for c in demo.calls)
        read = sequence["tokens"][sequence["workers"] == 2]
        assert tokenizer.decode(read.tolist()) == "".join(
            [
                demo.calls[1].context.removeprefix(common_prompt([c.context for c in demo.calls])),
                demo.calls[1].completion,
            ]
        )
    with_context = calls.sequence(0, LossWeights(1.0, True, tokenizer.join_ids))
    assert (with_context["weights"] > 0).tolist() == (with_context["workers"] > 0).tolist()


def test_batches_hold_whole_groups_and_go_on_where_they_stood():
    demos = list(demonstrations(SMALL, "hogwild", 12))
    tokenizer = load_tokenizer("builtin")
    batch = validation_batch(demos[:2], tokenizer, OPTIONS, 4)
    assert batch["seen"].shape == (4, 800, 2)
    assert (batch["segment_ids"][-1] == 0).all(), "rows that the data do not fill are empty"
    batches = train_iterator(tokenize(demos, tokenizer, OPTIONS), tokenizer, OPTIONS, rows_per_batch=2, seed=0)
    assert next(batches)["seen"].shape == (2, 800, 2)
    state = batches.get_state()
    expected = next(batches)
    batches.set_state(state)
    for name, array in next(batches).items():
        np.testing.assert_array_equal(array, expected[name])


def test_long_ones_are_dropped_and_counted_and_none_is_an_error():
    demos = list(demonstrations(SMALL, "hogwild", 6))
    tokenizer = load_tokenizer("builtin")
    lengths = SharedCalls(tokenize_shared(demos, tokenizer, row_len=1000)).lengths
    kept = SharedCalls(tokenize_shared(demos, tokenizer, row_len=int(lengths.max()) - 1))
    assert kept.num_dropped == int((lengths == lengths.max()).sum())
    with pytest.raises(ValueError, match="nothing to train on"):
        tokenize(demos, tokenizer, dataclasses.replace(OPTIONS, row_len=10))
    with pytest.raises(ValueError, match="no line in common"):
        common_prompt(["a\nb\n", "c\nb\n"])
    with pytest.raises(ValueError, match="a header"):
        shared_sequence(PROMPT, [Segment([], [1])])
