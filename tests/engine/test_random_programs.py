"""Random programs through the real engine in a cache for two full threads: every call is what naive decoding gives.

Each program keeps its own list of tokens, which its thread must equal after every operation. Each call's context must
be that list at a Decode, and its tokens the greedy ones of forwards without any cache, under the weights of its run.
"""

import collections
import random

import numpy as np
import pytest
from flax import nnx

from apr_jax.engine.threads import Append, Decode, Join, Open, Spawn, StopReason, Truncate
from apr_jax.model.params import graphdef
from tests.engine.helpers import BANNED, MODEL, TOLERANCE, all_calls, keyed, make_engine, make_params, prompt
from tests.model.naive import naive_logits

pytestmark = pytest.mark.heavy

STOPS = (1, 2, 3, 4)
OPERATIONS = ("open", "fork", "decode", "truncate", "append", "spawn", "join", "cancel")


class RandomThread:
    """A program from a seed and its path. `journal` gets the contexts of its decodes, `counts` its operations."""

    def __init__(self, seed, path, journal, counts, fork_of=None):
        self.seed, self.path, self.journal, self.counts, self.fork_of = seed, path, journal, counts, fork_of
        self.rng = random.Random(f"{seed} {path}")
        self.spawns = 0

    def program(self):
        rng, counts = self.rng, self.counts
        # Prompts of all programs and runs begin alike, so that pages are shared between them.
        tokens = prompt(0, rng.randint(1, 40)) if self.fork_of is None else prompt(len(self.path), rng.randint(1, 4))
        counts["open" if self.fork_of is None else "fork"] += 1
        self.model = [*(self.fork_of.tokens if self.fork_of else ()), *tokens]
        self.thread = yield Open(tokens, self.fork_of)
        yield from self.decode()
        for _ in range(rng.randint(1, 3)):
            if len(self.path) < 4 and rng.random() < 0.6:
                yield from self.spawn()
            if rng.random() < 0.6:
                counts["truncate"] += 1
                length = rng.randint(1, len(self.model))
                yield Truncate(self.thread, length)
                del self.model[length:]
            if rng.random() < 0.6:
                counts["append"] += 1
                more = prompt(rng.randint(0, 9), rng.randint(1, 6))
                yield Append(self.thread, more)
                self.model.extend(more)
            yield from self.decode()
        return len(self.model)

    def decode(self):
        before = len(self.model)
        assert self.thread.tokens == self.model
        self.counts["decode"] += 1
        self.journal[self.path].append(list(self.model))
        stop = yield Decode(self.thread, STOPS)
        written = self.thread.tokens[before:]
        assert self.thread.tokens[:before] == self.model
        assert not set(written[:-1]) & set(STOPS), "a stop token was passed"
        assert (stop.reason is StopReason.TOKEN) == bool(written and written[-1] in STOPS)
        self.model.extend(written)

    def spawn(self):
        """Children that run to their end, or until one of them succeeds; sometimes their parent goes on beside them."""
        rng, path = self.rng, (*self.path, self.spawns)
        self.counts["spawn"] += 1
        self.spawns += 1
        fork_of = self.thread if rng.random() < 0.5 and len(self.model) < 80 else None
        children = [
            RandomThread(self.seed, (*path, child), self.journal, self.counts, fork_of).program()
            for child in range(rng.randint(1, 3))
        ]
        handle = yield Spawn(children)
        if rng.random() < 0.3:
            yield from self.decode()
        self.counts["join"] += 1
        values = yield Join(handle, (lambda value: value % 2 == 0) if rng.random() < 0.5 else None)
        self.counts["cancel"] += values.count(None)


def assert_greedy(params, calls):
    """The tokens are what naive decoding gives after each call's context, save for ties, and so are their logprobs."""
    rows = [[*call.context.tolist(), *call.tokens.tolist()] for call in calls]
    ties = total = 0
    logits = naive_logits(nnx.merge(graphdef(MODEL), params), rows, MODEL.max_seq_len)
    for call, logits_TV in zip(calls, logits, strict=True):
        logits_NV = logits_TV[len(call.context) - 1 : -1]
        logits_NV[:, BANNED] = -np.inf
        logprobs_NV = logits_NV - np.log(np.sum(np.exp(logits_NV), axis=1, keepdims=True))
        chosen_N = logprobs_NV[np.arange(len(call.tokens)), call.tokens]
        best_N = logprobs_NV.max(axis=1)
        assert (best_N - chosen_N < TOLERANCE).all()
        np.testing.assert_allclose(call.logprobs, chosen_N, atol=TOLERANCE)
        ties += int((logprobs_NV.argmax(axis=1) != call.tokens).sum())
        total += len(call.tokens)
    assert ties <= total / 100


def test_random_programs_decode_as_naively_under_every_policy():
    """Two policies in turn on one engine: pages that the other weights published are there, and are never read."""
    counts: collections.Counter[str] = collections.Counter()
    engine = make_engine(lanes=6, pages=25, prefill_lanes=2, steps_per_visit=6)
    for turn in range(3):
        params = make_params(seed=turn % 2)
        engine.set_params(params)
        journals = [collections.defaultdict(list) for _ in range(4)]
        programs = [
            RandomThread(10 * turn + index, (), journal, counts).program() for index, journal in enumerate(journals)
        ]
        rollouts = engine.run(keyed(programs), seed=0, temperature=0.0, on_progress=lambda _: engine._scheduler.check())
        assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)
        counts["preempt"] += engine.stats.preemptions
        counts["reused"] += engine.stats.reused
        for rollout, journal in zip(rollouts, journals, strict=True):
            asked = {path: iter(contexts) for path, contexts in journal.items()}
            for call in rollout.calls:
                # A Decode of a full thread leaves no call, and a cancelled thread's last ones may be cut.
                assert call.context.tolist() in asked[call.path]
        assert_greedy(params, all_calls(rollouts))
    assert sum(counts[name] for name in OPERATIONS) >= 500
    for name in (*OPERATIONS, "preempt", "reused"):
        assert counts[name] >= 5, f"{name}: {counts[name]}"
