"""Stop strings: what a thread keeps is decided by its text alone, however tokens and visits cut that."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from apr_jax.engine.stop_strings import StopStrings, StringWatch
from apr_jax.engine.threads import Append, Decode, Join, Open, Share, Spawn, StopReason, Truncate
from tests.engine.helpers import (
    TOLERANCE,
    NaiveInterpreter,
    all_calls,
    keyed,
    make_engine,
    prompt,
)
from tests.engine.test_programs import WIDE, StandIn, same, schedules, shapes

# Sixteen tokens: pieces of the markers, their beginnings and ends glued to others, and a character in two tokens.
PIECES = [
    b"",
    b"<",
    b">",
    b"end",
    b"<e",
    b"nd",
    b"nd>",
    b">\n",
    b"e\xc3",
    b"\xa9n",
    b"d",
    b"<<",
    b"a",
    b"\xc3",
    b"e",
    b"x",
]
MARKERS = ("<end>", "<e", "nd>\n", "én", "e")


def pieces(ids, before):
    assert before, "a Decode follows at least one token"
    return [PIECES[index % 16] for index in ids]


def first(written, markers):
    """Returns the count that a Decode should keep, by trying every length, with the marker and the bytes after it."""
    for count in range(1, len(written) + 1):
        text = b"".join(PIECES[token] for token in written[:count])
        found = [(text.find(m.encode()) + len(m.encode()), -len(m), m) for m in markers if m.encode() in text]
        if found:
            end, _, marker = min(found)
            return count, marker, len(text) - end
    return None


@settings(max_examples=3000, deadline=None)
@given(
    st.lists(st.integers(0, 15), max_size=40),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.sets(st.sampled_from(MARKERS), max_size=4),
)
def test_the_first_complete_string_is_found_wherever_it_lies(written, visits, markers):
    watch, done, found = StringWatch(StopStrings(tuple(markers), pieces)), 0, None
    while found is None and done < len(written):
        for steps in visits:
            found = watch.take([1, *written[:done]], written[done : done + steps])
            if found is not None:
                break
            done += steps
    expected = first(written, markers)
    assert (found and (done + found.count, found.string, found.excess)) == expected


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="an empty one"):
        StopStrings(("<end>", ""), pieces)


def marked(shape, length, cancel):
    """As `test_programs.tree`, with decodes that end at strings; what is cut off depends on where they end."""
    thread = yield Open([1 + i % 3 for i in range(length)])
    stops = StopStrings(MARKERS[:3], pieces)
    stop = yield Decode(thread, (15,), stop_strings=stops)
    for spawn in shape:
        before = len(thread.tokens)
        handle = yield Spawn([marked(child, 1 + (length * 7 + n) % 11, cancel) for n, child in enumerate(spawn)])
        values = yield Join(handle, (lambda value: value % 3 == 0) if cancel else None)
        yield Truncate(thread, max(1, before - 2 - stop.excess))
        yield Append(thread, [8 if value is None else 9 for value in values])
        stop = yield Decode(thread, (15,), stop_strings=stops)
    return len(thread.tokens) + stop.excess


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(shapes, st.integers(1, 30)), min_size=1, max_size=6),
    schedules,
    st.booleans(),
    st.integers(1, 200),
)
def test_every_schedule_gives_the_same_rollouts(trees, limits, cancel, total):
    """Also with visits of one step, which never draw a token too many, and where tokens run out."""

    def programs():
        return [marked(shape, length, cancel) for shape, length in trees]

    exact = StandIn(dataclasses.replace(WIDE, steps_per_visit=1), programs(), max_total_tokens=total).finish()
    same(StandIn(limits, programs(), max_total_tokens=total).finish(), exact)
    same(StandIn(WIDE, programs(), max_total_tokens=total).finish(), exact)
    for call in all_calls(exact):
        found = first(call.tokens.tolist(), MARKERS[:3])
        if call.stop.reason is StopReason.STRING:
            assert found == (len(call.tokens), call.stop.string, call.stop.excess)
        else:
            assert found is None


def spelling(seed):
    """Two decodes to a string, with a cut and an addition between; on the real engine."""
    thread = yield Open(prompt(seed, 9))
    before = len(thread.tokens)
    stops = StopStrings(("<e", "nd", "an"), pieces)
    first_stop = yield Decode(thread, (7,), stop_strings=stops)
    yield Truncate(thread, before + (len(thread.tokens) - before) // 2 or 1)
    yield Append(thread, [5, 6])
    second = yield Decode(thread, (7,), stop_strings=stops)
    return first_stop, second, list(thread.tokens)


def test_the_engine_trims_as_if_never_drawn():
    """The same rollouts at 1, 3 and 8 steps a visit; log-probabilities are the model's own of what is kept."""
    runs = {}
    for steps in (1, 3, 8):
        engine = make_engine(steps_per_visit=steps)
        programs = keyed([spelling(seed) for seed in range(12)])
        runs[steps] = engine.run(programs, seed=4, temperature=1.0)
        engine._scheduler.check()
        assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)
    stops = [call.stop.reason for call in all_calls(runs[1])]
    assert stops.count(StopReason.STRING) >= 8
    drawn = {steps: sum(rollout.work.decoded for rollout in run) for steps, run in runs.items()}
    kept = sum(rollout.generated_tokens for rollout in runs[1])
    assert drawn[8] > drawn[1] == kept, "longer visits draw tokens that are trimmed, which is work"
    for steps in (3, 8):
        same(runs[steps], runs[1])
        for a, b in zip(all_calls(runs[steps]), all_calls(runs[1]), strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)
    naive = NaiveInterpreter(runs[8][0])
    for call in all_calls(runs[8])[:6]:
        thread = call.context.tolist()
        for token, logprob in zip(call.tokens.tolist(), call.logprobs.tolist(), strict=True):
            assert abs(naive.logprobs(thread)[token] - logprob) < TOLERANCE
            thread.append(token)


def test_grammars_and_workers_take_no_stop_strings():
    class Anything:
        closed = True

    def both():
        thread = yield Open([1])
        yield Decode(thread, (), Anything(), stop_strings=StopStrings(("x",), pieces))

    def worker():
        thread = yield Open([1])
        yield Decode(thread, (), stop_strings=StopStrings(("x",), pieces))

    def sharing():
        yield Join((yield Share([1], [worker()])))

    with pytest.raises(ValueError, match="a grammar or stop strings"):
        StandIn(WIDE, [both()]).finish()
    with pytest.raises(ValueError, match="without stop strings"):
        StandIn(dataclasses.replace(WIDE, max_workers=2), [sharing()]).finish()
