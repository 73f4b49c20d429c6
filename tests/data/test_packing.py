import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apr_jax.data.packing import pack


def sequences_of(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    """Sequences whose every value is unique, so that a misplaced one shows."""
    starts = np.cumsum([1, *lengths])
    return [
        {
            "tokens": np.arange(start, start + length, dtype=np.int32),
            "advantages": -np.arange(start, start + length, dtype=np.float32),
        }
        for start, length in zip(starts, lengths, strict=False)
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 64))
@settings(max_examples=150, deadline=None)
def test_every_token_lies_once_in_a_segment_of_its_own(lengths: list[int], row_len: int):
    sequences = sequences_of(lengths)
    packing = pack(sequences, row_len)
    tokens, segments, positions = (packing.rows[name] for name in ("tokens", "segment_ids", "positions"))
    assert tokens.shape == segments.shape == positions.shape == (packing.num_rows, row_len)
    for sequence, (row, start), back in zip(sequences, packing.places, packing.read_back(tokens), strict=True):
        span = slice(start, start + len(back))
        np.testing.assert_array_equal(back, sequence["tokens"])
        np.testing.assert_array_equal(positions[row, span], np.arange(len(back)))
        (segment,) = set(segments[row, span].tolist())
        assert (segments[row] == segment).sum() == len(back)
    np.testing.assert_array_equal(packing.rows["advantages"], -tokens.astype(np.float32))
    assert (tokens[segments == 0] == 0).all()
    assert (segments > 0).sum() == sum(lengths)
    for row in segments:  # 1, 2, .. from left to right, then padding
        used = row[row > 0]
        assert (row[: len(used)] > 0).all()
        assert set(np.diff([0, *used])) <= {0, 1}
    assert packing.filled == pytest.approx(sum(lengths) / tokens.size)


def _first_fit_decreasing(lengths: list[int], row_len: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = next((row for row, room in enumerate(rooms) if room >= length), None)
        if fitting is None:
            rooms.append(row_len - length)
        else:
            rooms[fitting] -= length
    return len(rooms)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
@example([20] + [21] * 8)
@settings(max_examples=100, deadline=None)
def test_no_two_rows_could_be_one(lengths: list[int]):
    segments = pack(sequences_of(lengths), 40).rows["segment_ids"]
    used = sorted((segments > 0).sum(1).tolist())
    assert len(used) < 2 or used[0] + used[1] > 40
    assert len(segments) <= 11 / 9 * _first_fit_decreasing(lengths, 40) + 1


def test_rows_are_filled_exactly_where_that_is_possible():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in [*rng.integers(200, 450, 100), *rng.integers(50, 90, 900)]]
    assert pack(sequences_of(lengths), 512).filled > 0.97


def test_dtypes_are_kept_and_the_result_is_a_function_of_the_input():
    sequences = sequences_of([3, 9, 4, 4, 1])
    first, second = pack(sequences, 10), pack(sequences, 10)
    assert first.rows["tokens"].dtype == np.int32
    assert first.rows["advantages"].dtype == np.float32
    assert first.rows["segment_ids"].dtype == first.rows["positions"].dtype == np.int32
    for name, rows in first.rows.items():
        np.testing.assert_array_equal(rows, second.rows[name])


def test_further_axes_are_kept():
    sequences = [{"tokens": np.arange(n), "pairs": np.arange(2 * n).reshape(n, 2)} for n in (3, 5, 4)]
    packing = pack(sequences, 8)
    assert packing.rows["pairs"].shape == (packing.num_rows, 8, 2)
    for sequence, pairs in zip(sequences, packing.read_back(packing.rows["pairs"]), strict=True):
        np.testing.assert_array_equal(pairs, sequence["pairs"])


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "nothing to pack"),
        (sequences_of([5, 11]), "sequence 1 has 11 tokens; a row takes 1 to 10"),
        ([{"tokens": np.zeros(0)}], "sequence 0 has 0 tokens"),
        ([{"tokens": np.zeros(3), "weights": np.zeros(4)}], "of one length"),
        ([{"tokens": np.zeros((3, 2)), "weights": np.zeros(2)}], "of one length"),
        ([{"tokens": np.zeros(())}], "of one length"),
        ([{"tokens": np.zeros(3)}, {"ids": np.zeros(3)}], "the first one has"),
    ],
)
def test_what_cannot_be_packed_is_refused(sequences: list[dict[str, np.ndarray]], message: str):
    with pytest.raises(ValueError, match=message):
        pack(sequences, 10)
