"""Problems through a twentieth of the cache that they need: the same tokens, and nothing leaks.

A thread whose pages were taken is computed again by prefill, whose sums have another order than those of decoding. So
log-probabilities agree to the last bits, and a draw may fall on the other side of a boundary once in a million tokens.
"""

import gc
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Rollout, RolloutKey
from tests.engine.helpers import make_engine, searching

PROBLEMS = 10_000  # in 15 minutes
BATCH = 250
LANES = 48
ROW = 12  # pages of a full thread
AMPLE = LANES * 40  # pages: nothing is ever preempted
MAY_GROW = 48 * 2**20  # bytes of the process, after the first third
MAY_DIFFER = 1e-4  # of rollouts: those with a draw at a boundary


def drill(folder: pathlib.Path, share: float, seed: int) -> str:
    """Decodes a share of the problems in an ample and in a tight cache, at the same lane width."""
    del folder
    batches = max(3, round(PROBLEMS * share / BATCH))
    ample = make_engine(lanes=LANES, pages=AMPLE)
    needed, expected = 0, []
    for batch in range(batches):
        rollouts, held = _run(ample, seed, batch)
        needed = max(needed, held)
        expected.append(_outcomes(rollouts))
        print(f"soak: cache: {(batch + 1) * BATCH:,} problems in an ample cache", flush=True)
    assert ample.stats.preemptions == 0
    del ample
    pages = max(needed // 20, ROW + 2)
    tight, before = make_engine(lanes=LANES, pages=pages), (0, 0)
    preemptions = differing = 0
    for batch in range(batches):
        rollouts, _ = _run(tight, seed, batch)
        preemptions += tight.stats.preemptions
        assert _num_held(tight) == 0, "pages were lost"
        differing += _num_differing(_outcomes(rollouts), expected[batch])
        del rollouts
        if batch == batches // 3:
            before = _held_by_process()
        print(
            f"soak: cache: {(batch + 1) * BATCH:,} problems in {pages} pages, {preemptions:,} preemptions", flush=True
        )
    after = _held_by_process()
    assert preemptions > 0
    assert differing <= max(1, batches * BATCH * MAY_DIFFER), (
        f"{differing} rollouts differ from those in an ample cache"
    )
    assert after[0] <= before[0] + MAY_GROW, f"memory grew from {before[0]:,} to {after[0]:,} bytes"
    assert after[1] <= before[1], f"open files grew from {before[1]} to {after[1]}"
    return (
        f"{batches * BATCH:,} problems in {pages} of the {needed} pages that they need, {preemptions:,} preemptions, "
        f"{differing} rollouts with other tokens, no page, descriptor or memory lost"
    )


def _run(engine: Engine, seed: int, batch: int) -> tuple[Sequence[Rollout], int]:
    """Decodes a batch, checks the scheduler at every visit, and returns the most pages that were held at one."""
    rng, held = random.Random(f"{seed} {batch}"), 0
    programs = [
        (
            RolloutKey(batch * BATCH + index, 0),
            searching(rng.randrange(2**20), depth=rng.randint(0, 2), length=rng.randint(4, 30)),
        )
        for index in range(BATCH)
    ]

    def look(_: Any) -> None:
        nonlocal held
        engine._scheduler.check()
        held = max(held, _num_held(engine))

    return engine.run(programs, seed=seed, temperature=1.0, on_progress=look), held


def _outcomes(rollouts: Sequence[Rollout]) -> list[dict[tuple[int, ...], tuple[bytes, np.ndarray]]]:
    """Returns of each rollout, by a thread's path, all tokens of its calls and their log-probabilities."""
    outcomes = []
    for rollout in rollouts:
        threads: dict[tuple[int, ...], list[Any]] = {}
        for call in rollout.calls:
            threads.setdefault(call.path, []).append(call)
        outcomes.append(
            {
                path: (
                    b"|".join(np.asarray(call.tokens, np.int32).tobytes() for call in calls),
                    np.concatenate([call.logprobs for call in calls]),
                )
                for path, calls in threads.items()
            }
        )
    return outcomes


def _num_differing(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Counts the rollouts that have other tokens. Raises AssertionError where equal tokens have other odds."""
    differing = 0
    for one, other in zip(ours, theirs, strict=True):
        if {path: tokens for path, (tokens, _) in one.items()} != {path: tokens for path, (tokens, _) in other.items()}:
            differing += 1
            continue
        for path, (_, logprobs) in one.items():
            np.testing.assert_allclose(logprobs, other[path][1], atol=1e-4)
    return differing


def _num_held(engine: Engine) -> int:
    return sum(allocator.num_held for allocator in engine._scheduler.cache.allocators)


def _held_by_process() -> tuple[int, int]:
    """Returns the bytes and the open files of this process; (0, 0) where it is not told."""
    gc.collect()
    jax.effects_barrier()
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        return 0, 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
