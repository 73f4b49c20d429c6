import collections
import dataclasses
import functools
import itertools
import json
import logging

import numpy as np
import pytest

from apr_jax.data.facts import Facts
from apr_jax.data.pipeline import SequenceOptions, tokenize, train_iterator, validation_batch
from apr_jax.data.tokenized import LossWeights, TokenizedCalls, tokenize_calls
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Call, Demonstration
from apr_jax.tasks.dialect import JOIN_BEGIN
from tests.tasks.settings import REFERENCE

TOKENIZER = BuiltinTokenizer()
ROW_LEN = 512
DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}


OPTIONS = SequenceOptions(row_len=ROW_LEN, replay_weight=4.0, loss_on_context=False, shares_cache=False)


def make_iterator(source, seed=3, make_facts=None, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    calls = tokenize(source, TOKENIZER, options)
    return train_iterator(calls, TOKENIZER, options, rows_per_batch=4, seed=seed, make_facts=make_facts)


def load_calls(folder) -> TokenizedCalls:
    return TokenizedCalls({path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")})


def some_facts(num_tokens: int) -> Facts:
    return Facts.of_share(0.2, num_tokens, TASKS["countdown"], REFERENCE, TOKENIZER, seed=3, row_len=ROW_LEN)


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def segments_of(batches: list[dict[str, np.ndarray]]) -> list[tuple[int, ...]]:
    """Every packed sequence as [inputs, then the last target]."""
    found = []
    for batch in batches:
        for row, ids in enumerate(batch["segment_ids"]):
            for segment in range(1, ids.max() + 1):
                where = ids == segment
                np.testing.assert_array_equal(batch["positions"][row][where], np.arange(where.sum()))
                tokens, targets = batch["tokens"][row][where], batch["targets"][row][where]
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                found.append((*tokens.tolist(), int(targets[-1])))
    return found


def sequences_in(source) -> list[tuple[int, ...]]:
    return [
        (TOKENIZER.bos_id, *TOKENIZER.encode(call.context + call.completion))
        + (() if call.ends_in_spawn else (TOKENIZER.eos_id,))
        for demonstration in source
        for call in demonstration.calls
    ]


def fitting(source) -> list[tuple[int, ...]]:
    return [sequence for sequence in sequences_in(source) if len(sequence) - 1 <= ROW_LEN]


def test_batches_have_fixed_shapes_and_full_rows(train):
    batches = take(make_iterator(train), 40)
    for batch in batches:
        assert {name: array.dtype for name, array in batch.items()} == DTYPES
        assert {array.shape for array in batch.values()} == {(4, ROW_LEN)}
        padding = batch["segment_ids"] == 0
        assert not any(batch[name][padding].any() for name in ("tokens", "targets", "weights", "positions"))
    assert np.mean([(batch["segment_ids"] > 0).mean() for batch in batches]) >= 0.95


def test_every_call_comes_once_an_epoch_and_each_epoch_has_its_order(train):
    batches = make_iterator(train)
    expected = collections.Counter(fitting(train))
    calls = TokenizedCalls(tokenize_calls(train, TOKENIZER, row_len=ROW_LEN))
    assert len(calls) == expected.total()
    assert calls.lengths.sum() == sum((len(sequence) - 1) * count for sequence, count in expected.items())
    seen = collections.Counter(segments_of(take(batches, 120)))
    assert set(seen) == set(expected)
    epochs = seen.total() / expected.total()
    assert epochs > 3
    for sequence, count in expected.items():  # within a window of packing, an epoch may run ahead or lag
        assert abs(seen[sequence] - epochs * count) <= 2 * count + 1


def test_seeds_differ_and_one_seed_repeats(train):
    assert_same(take(make_iterator(train), 5), take(make_iterator(train), 5))
    first, other = take(make_iterator(train), 1)[0], take(make_iterator(train, seed=4), 1)[0]
    assert (first["tokens"] != other["tokens"]).any()


@pytest.mark.heavy
def test_batches_do_not_depend_on_who_packs_them(train, tmp_path):
    source = train[:40]
    arrays = tokenize_calls(source, TOKENIZER, row_len=ROW_LEN)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    reopen = functools.partial(load_calls, tmp_path)

    def batches(num_workers):
        calls = TokenizedCalls(arrays)
        several = {"num_workers": num_workers, "reopen": reopen}
        return train_iterator(calls, TOKENIZER, OPTIONS, rows_per_batch=48, seed=3, make_facts=some_facts, **several)

    alone = batches(1)
    expected, state = take(alone, 4), alone.get_state()
    together = batches(2)
    assert_same(take(together, 4), expected)
    assert together.get_state() == state
    others = batches(2)
    others.set_state(state)
    assert_same(take(others, 3), take(alone, 3))


def test_calls_that_no_other_process_can_open_are_packed_by_this_one(train):
    calls = tokenize(train, TOKENIZER, OPTIONS)
    batches = train_iterator(calls, TOKENIZER, OPTIONS, rows_per_batch=4, seed=3, num_workers=2)
    assert_same(take(batches, 3), take(make_iterator(train), 3))


@pytest.mark.parametrize("steps", [0, 1, 5, 31, 32, 33, 70, 150])
def test_restored_equals_undisturbed(train, steps: int):
    undisturbed = make_iterator(train)
    take(undisturbed, steps)
    state = json.loads(json.dumps(undisturbed.get_state()))
    expected = take(undisturbed, 40)
    restored = make_iterator(train)
    restored.set_state(state)
    assert restored.get_state() == state
    assert_same(take(restored, 40), expected)
    undisturbed.set_state(state)  # also backwards, in place
    assert_same(take(undisturbed, 40), expected)
    assert restored.get_state() == undisturbed.get_state()
    assert len(json.dumps(state)) < 300


def test_facts_come_beside_every_call_and_resume_with_them(train):
    def make(num_tokens):
        return Facts.of_share(0.3, num_tokens, TASKS["countdown"], REFERENCE, TOKENIZER, seed=0, row_len=ROW_LEN)

    batches = make_iterator(train, make_facts=make)
    facts = {
        (*x["tokens"].tolist(), int(x["targets"][-1]))
        for x in make(sum(len(sequence) - 1 for sequence in fitting(train)))
    }
    rows = take(batches, 120)
    seen = segments_of(rows)
    assert set(seen) == facts | set(fitting(train))
    of_facts = sum(len(sequence) - 1 for sequence in seen if sequence in facts)
    assert of_facts / sum(len(sequence) - 1 for sequence in seen) == pytest.approx(0.3, abs=0.03)
    again = make_iterator(train, make_facts=make)
    state = take(again, 50) and again.get_state()
    restored = make_iterator(train, make_facts=make)
    restored.set_state(json.loads(json.dumps(state)))
    assert_same(take(restored, 20), rows[50:70])


def weights_of(call: Call, **changes) -> list[tuple[str, float]]:
    demonstration = Demonstration(None, "adaptive", (call,), None, False)
    settings = LossWeights(4.0, False, TOKENIZER.join_ids)
    calls = TokenizedCalls(tokenize_calls([demonstration], TOKENIZER, row_len=ROW_LEN))
    sequence = calls.sequence(0, dataclasses.replace(settings, **changes))
    return list(zip(TOKENIZER.token_texts(sequence["targets"].tolist()), sequence["weights"].tolist(), strict=True))


def test_weights_follow_the_kind_of_target():
    call = Call(f"{JOIN_BEGIN}7\n", f"1,1\n2\n{JOIN_BEGIN}", 0, ends_in_spawn=False, replay_start=len("1,1\n"))
    context = [(JOIN_BEGIN, 0.0), ("7", 0.0), ("\n", 0.0)]
    plain, replay = [("1", 1.0), (",1", 1.0), ("\n", 1.0)], [("2", 4.0), ("\n", 4.0), (JOIN_BEGIN, 0.0)]
    assert weights_of(call) == [*context, *plain, *replay, ("", 1.0)]
    with_context = [(JOIN_BEGIN, 0.0), ("7", 1.0), ("\n", 1.0)]
    assert weights_of(call, loss_on_context=True) == [*with_context, *plain, *replay, ("", 1.0)]


def test_a_spawn_has_no_eos_and_no_replay_no_extra_weight():
    call = Call("7\n", "1\n<End Calling Sub Searches>\n", 0, ends_in_spawn=True, replay_start=28)
    call = dataclasses.replace(call, replay_start=len(call.completion))
    assert weights_of(call)[-1] == ("<End Calling Sub Searches>\n", 1.0)
    assert {weight for _, weight in weights_of(call)} == {0.0, 1.0}


def test_calls_longer_than_a_row_are_counted_and_logged(train, caplog: pytest.LogCaptureFixture):
    row_len = 100
    lengths = [len(sequence) - 1 for sequence in sequences_in(train)]
    with caplog.at_level(logging.WARNING):
        batches = make_iterator(train, row_len=row_len)
    calls = TokenizedCalls(tokenize_calls(train, TOKENIZER, row_len=row_len))
    assert calls.num_dropped == sum(length > row_len for length in lengths) > 0
    assert len(calls) == len(lengths) - calls.num_dropped
    assert f"{calls.num_dropped} of {len(lengths)} calls" in caplog.text
    assert set(segments_of(take(batches, 200))) == {s for s in sequences_in(train) if len(s) - 1 <= row_len}
    with pytest.raises(ValueError, match="nothing to train on"):
        make_iterator(train, row_len=8)


def validate(source, num_rows: int) -> dict[str, np.ndarray]:
    return validation_batch(source, TOKENIZER, OPTIONS, num_rows)


def test_validation_is_the_first_calls(train):
    batch = validate(train, 12)
    assert_same([batch], [validate(train, 12)])
    assert {name: array.dtype for name, array in batch.items()} == DTYPES
    assert {array.shape for array in batch.values()} == {(12, ROW_LEN)}
    found = segments_of([batch])
    assert collections.Counter(found) == collections.Counter(fitting(train)[: len(found)])
    assert (batch["segment_ids"] > 0).mean() > 0.9


def test_validation_with_less_data_than_rows_ends_in_empty_rows(train):
    batch = validate(train[:3], 400)
    assert collections.Counter(segments_of([batch])) == collections.Counter(fitting(train[:3]))
    assert batch["tokens"].shape == (400, ROW_LEN)
    assert not batch["segment_ids"][-4:].any()
    assert not batch["weights"][-4:].any()
