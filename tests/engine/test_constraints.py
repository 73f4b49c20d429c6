"""Constrained decoding: host and device agree, and what is drawn and recorded is the masked policy."""

import dataclasses
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from apr_jax.engine import policy_masks
from apr_jax.engine.constraints import FREE, START, Automaton, Edge, Gate, Registers, words
from apr_jax.engine.threads import Append, Decode, Open, RolloutKey, Spawn, StopReason, Truncate
from apr_jax.engine.threads import Join as JoinRequest
from tests.engine.helpers import (
    MODEL,
    TOLERANCE,
    NaiveInterpreter,
    all_calls,
    assert_same_bits,
    keyed,
    make_engine,
    make_mesh,
    prompt,
)

pytestmark = pytest.mark.heavy

VOCAB, STOP, GATE, END = MODEL.vocab_size, 1, 5, 6
DRAWN = (STOP, 2, 3, 4, GATE, 40, 41, 42, 43)  # what a free thread may draw, here
BANNED = tuple(sorted(set(range(VOCAB)) - {*DRAWN, END}))
LIMITS = Gate(GATE, reserved=(END,), follows=frozenset((2, 3, 40, 42)), max_edges=48, max_leaves=40)


# Host against device.


@st.composite
def automata(draw) -> Automaton:
    """Each leaf has a path of its own from START and back, open for some counts; END leads out from some count on."""
    num_leaves = draw(st.integers(1, 12))
    edges, state = [Edge(START, END, FREE, low=draw(st.integers(0, 2)))], 100
    for leaf in draw(st.permutations([3, 31, 32, 39, 0, 1, 2, 4, 5, 6, 7, 8]))[:num_leaves]:
        low = draw(st.integers(0, 2))
        source, conditions = START, {"low": low, "high": low + draw(st.integers(0, 3))}
        tokens = [10 + leaf, *draw(st.lists(st.integers(0, 9), max_size=2))]
        for place, token in enumerate(tokens):
            state += 1
            target = START if place == len(tokens) - 1 else state
            edges.append(Edge(source, token, target, leaves=1 << leaf, **conditions))
            source, conditions = target, {}
    return Automaton(LIMITS, draw(st.permutations(edges)))


@jax.jit
def on_device(table, registers, drawn):
    gate = jax.tree.map(jnp.asarray, policy_masks.gate_masks(LIMITS, VOCAB))
    constraints = policy_masks.LaneConstraints(table, jnp.int32(0), registers)
    step = policy_masks.constrain_step(constraints, gate, jnp.zeros(VOCAB, bool), jnp.int32(2), jnp.int32(0))
    after, _ = step.after(jnp.zeros(VOCAB), drawn)
    return step.banned_mask, after


def lane(registers: Registers) -> policy_masks.LaneRegisters:
    used = words(registers.used, LIMITS.num_words)
    return policy_masks.LaneRegisters(jnp.int32(registers.state), jnp.asarray(used), jnp.int32(registers.count))


@settings(max_examples=60, deadline=None)
@given(automata(), st.randoms(use_true_random=False))
def test_device_and_host_walk_alike(automaton, random):
    registers, device = Registers(), lane(Registers())
    for _ in range(30):
        choices = automaton.choices(registers)
        if not choices:
            break
        token = random.choice(choices)
        banned_V, device = on_device(automaton.table(), device, token)
        assert np.flatnonzero(~np.asarray(banned_V)).tolist() == sorted(choices)
        registers = automaton.step(registers, token)
        jax.tree.map(np.testing.assert_array_equal, device, lane(registers))
        if registers.state == FREE:
            break


def test_a_leaf_is_used_once_and_counts_open_and_close():
    one = Edge(START, 11, START, leaves=1)
    two = Edge(START, 12, START, leaves=2, high=0)
    automaton = Automaton(LIMITS, [one, two, Edge(START, END, FREE, low=1)])
    assert automaton.choices(Registers()) == (11, 12)
    after = automaton.step(Registers(), 11)
    assert after == Registers(START, used=1, count=1)
    assert automaton.choices(after) == (END,)
    with pytest.raises(StopIteration):
        automaton.step(after, 12)


def test_an_automaton_that_does_not_fit_is_refused():
    edges = [Edge(START, token, FREE) for token in range(42)]
    with pytest.raises(ValueError, match="42 edges, 42 at one state; at most 48 and 41 fit"):
        Automaton(LIMITS, edges)


# The engine. A grammar of its own: the gate is open where the tokens before it add up to a multiple of 3; then come
# pairs (10 + index, leaf) of distinct leaves among the numbers of 40 and more that the thread holds, at most two.


def is_open(tokens) -> bool:
    return sum(tokens) % 3 == 0


def leaves(tokens) -> list[int]:
    return sorted({token for token in tokens if 40 <= token < 44} | {43})


class Pairs:
    closed = False

    def is_open(self, tokens):
        return is_open(tokens)

    def automaton(self, tokens):
        edges = [Edge(START, END, FREE, low=1)]
        for index in range(2):
            edges.append(Edge(START, 10 + index, 2, low=index, high=index, leaves=(1 << len(leaves(tokens))) - 1))
        edges += [Edge(2, token, START, leaves=1 << leaf) for leaf, token in enumerate(leaves(tokens))]
        return Automaton(LIMITS, edges)


@dataclasses.dataclass
class Shut:
    closed: bool

    def is_open(self, tokens):
        return False

    def automaton(self, tokens):
        raise AssertionError("never open")


def allowed_by_definition(tokens: list[int], held_since: int | None) -> set[int]:
    """What may follow, found by listing every sequence of pairs."""
    if held_since is None:
        gate = {GATE} if tokens[-1] in LIMITS.follows and is_open(tokens) else set()
        return set(DRAWN) - {GATE} | gate
    done, found = tokens[held_since:], leaves(tokens[:held_since])
    whole = [
        [token for index, leaf in enumerate(chosen) for token in (10 + index, leaf)] + [END]
        for size in (1, 2)
        for chosen in itertools.permutations(found, size)
    ]
    return {sequence[len(done)] for sequence in whole if sequence[: len(done)] == done}


def constrained(seed, depth=1, length=7):
    thread = yield Open(prompt(seed, length))
    for turn in range(3):
        before = len(thread.tokens)
        yield Decode(thread, (STOP, END), Pairs())
        if depth and not turn:
            handle = yield Spawn([constrained(7 * seed + child, depth - 1, 4 + child) for child in range(2)])
            yield JoinRequest(handle)
        yield Truncate(thread, max(1, before - 2))
        yield Append(thread, [2 + turn, 40 + seed % 3])
    return len(thread.tokens)


@pytest.fixture(scope="module")
def engine():
    return make_engine(banned=BANNED, gate=LIMITS)


def check_against_definition(call, naive, greedy):
    tokens, held_since, held = call.context.tolist(), None, 0
    assert len(call.masks.bans) == len(call.masks.allowed) == len(call.tokens)
    for token, logprob, ids in zip(call.tokens.tolist(), call.logprobs, call.masks.allowed, strict=True):
        allowed = sorted(allowed_by_definition(tokens, held_since))
        if held_since is not None:
            assert sorted(ids[ids >= 0].tolist()) == allowed
            held += 1
        scores = naive.logprobs(tokens)[allowed].astype(np.float64)
        expected = scores - np.log(np.sum(np.exp(scores - scores.max()))) - scores.max()
        place = allowed.index(token)
        np.testing.assert_allclose(logprob, expected[place], atol=TOLERANCE)
        assert not greedy or expected[place] >= expected.max() - TOLERANCE
        tokens.append(token)
        held_since = len(tokens) if token == GATE else None if token == END else held_since
    return held


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_and_log_probabilities_are_the_masked_policys(engine, temperature):
    rollouts = engine.run(keyed([constrained(seed) for seed in range(10)]), seed=1, temperature=temperature)
    naive = NaiveInterpreter(rollouts[0], banned=())
    calls = all_calls(rollouts)
    held = sum(check_against_definition(call, naive, greedy=temperature == 0) for call in calls)
    assert held > 20
    assert engine.stats.generated > sum(len(call.tokens) for call in calls), "no draw was refused"


def test_bits_depend_on_no_schedule(engine):
    def programs():
        return keyed([constrained(seed) for seed in range(8)])

    expected = engine.run(programs(), seed=3, temperature=1.0)
    assert any(len(call.masks.allowed.T) for call in all_calls(expected))
    again = engine.run(list(reversed(programs())), seed=3, temperature=1.0)
    starved = make_engine(make_mesh(data=2), banned=BANNED, gate=LIMITS, lanes=2, prefill_lanes=2, pages=13)
    for one, other in zip(expected, reversed(again), strict=True):
        assert_same_bits(one, other)
    for one, other in zip(expected, starved.run(programs(), seed=3, temperature=1.0), strict=True):
        assert [call.tokens.tolist() for call in one.calls] == [call.tokens.tolist() for call in other.calls]
    assert starved.stats.preemptions > 0


def test_refusing_and_drawing_again_is_the_policy_without_the_gate(engine):
    """One token each, from the same context: drawn, refused and drawn again, against the gate banned from the start."""

    context = [*prompt(5, MODEL.max_seq_len - 2), 2]  # room for one more

    def one_token(grammar):
        thread = yield Open(context)
        yield Decode(thread, (STOP,), grammar)
        return thread.tokens[-1]

    def run(closed):
        programs = [(RolloutKey(0, sample), one_token(Shut(closed))) for sample in range(samples)]
        return engine.run(programs, seed=0, temperature=1.0)

    samples = 600
    free = np.exp(NaiveInterpreter(run(True)[0], banned=BANNED).logprobs(context).astype(np.float64))
    free[END] = 0.0
    assert free[GATE] / free.sum() > 0.01, "choose a context in which the gate is likely"
    free[GATE] = 0.0
    expected = free / free.sum()
    for closed in (False, True):
        rollouts = run(closed)
        assert (engine.stats.generated > samples) == (not closed)
        tokens = [rollout.result for rollout in rollouts]
        logprobs = [rollout.calls[0].logprobs[0] for rollout in rollouts]
        np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=TOLERANCE)
        counts = np.bincount(tokens, minlength=VOCAB)
        sigma = np.sqrt(samples * expected * (1 - expected))
        assert np.all(np.abs(counts - samples * expected) <= 5 * sigma)


def test_a_thread_without_grammar_is_held_to_nothing(engine):
    """It may write the gate and what is reserved, wherever it likes, and does not wait for the host at the gate."""

    def plain(seed):
        thread = yield Open(prompt(seed, 6))
        yield Decode(thread, (STOP,))

    rollouts = engine.run(keyed([plain(seed) for seed in range(20)]), seed=0, temperature=1.0)
    calls, naive = all_calls(rollouts), NaiveInterpreter(rollouts[0], banned=BANNED)
    assert {GATE, END} <= {token for call in calls for token in call.tokens.tolist()}
    assert engine.stats.generated == sum(len(call.tokens) for call in calls)
    for call in calls:
        assert call.masks is None
        whole = [*call.context.tolist(), *call.tokens.tolist()]
        for place in range(len(call.context), len(whole)):
            expected = naive.logprobs(whole[:place])[whole[place]]
            np.testing.assert_allclose(call.logprobs[place - len(call.context)], expected, atol=TOLERANCE)


def test_a_cancelled_call_is_trimmed_with_its_masks(engine):
    def leaf(seed, length):
        thread = yield Open(prompt(seed, length))
        yield Decode(thread, (), Pairs() if seed else None)
        return seed

    def parent():
        yield Open([2])
        handle = yield Spawn([leaf(1, 3), leaf(0, MODEL.max_seq_len - 4)])
        return (yield JoinRequest(handle, lambda seed: seed == 0))

    (rollout,) = engine.run(keyed([parent()]), seed=0, temperature=1.0)
    call = rollout.calls[0]
    assert (rollout.result, call.stop.reason) == ([None, 0], StopReason.CANCELLED)
    assert len(call.tokens) == len(call.masks.bans) == len(call.masks.allowed) == 4


def test_a_grammar_needs_a_gate():
    def program():
        thread = yield Open([2])
        yield Decode(thread, (), Pairs())

    with pytest.raises(ValueError, match="needs an engine with a gate"):
        make_engine().run(keyed([program()]), seed=0, temperature=1.0)
