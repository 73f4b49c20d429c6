"""Holds a program's accounts against counts that were made by hand, on every engine that plays scripts.

    check(lambda: serial(PROBLEM, settings()), {(): ["No solution found.\\n"]}, Counts(generated=2, ...))

The script says what each thread's successive calls write (`fixtures.TextScript`), so that every count of a program can
be told beforehand: `lengths` of its texts, `keys` of what went through the model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from apr_jax.engine.threads import Path, Program, Rollout, RolloutKey
from tests.reasoning.fixtures import TOKENIZER, TextScript
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine

MAX_SEQ_LEN = 512
AMPLE = 2_000  # pages: nothing is ever preempted
TIGHT = MAX_SEQ_LEN // 16 + 3  # little more than one full thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What the meter tells of a rollout (`Rollout`, `Work`)."""

    generated: int
    sequential: int
    peak_context: int
    threads: int
    prefilled: int  # this and the next two: where nothing is preempted, and only forks share pages
    attended: int
    decoded: int | None = None  # None: as `generated`, which is so unless something is cancelled

    @property
    def of_any_schedule(self) -> tuple[int, ...]:
        return (self.generated, self.sequential, self.peak_context, self.threads)

    @property
    def of_work(self) -> tuple[int, ...]:
        return (self.prefilled, self.generated if self.decoded is None else self.decoded, self.attended)


def counted(rollout: Rollout) -> Counts:
    return Counts(
        generated=rollout.generated_tokens,
        sequential=rollout.sequential_tokens,
        peak_context=rollout.peak_context,
        threads=rollout.num_threads,
        prefilled=rollout.work.prefilled,
        attended=rollout.work.attended,
        decoded=rollout.work.decoded,
    )


def check(
    program: Callable[[], Program],
    texts: Mapping[Path, Sequence[str]],
    expected: Counts,
    *,
    cancels: bool = False,
    workers: int = 0,
    logprob: Callable[[Path], float] = lambda path: 0.0,
) -> Rollout:
    """Plays the script on the scripted engine, and on the engine's own host with 1, 2, 3 and 16 lanes.

    With ample pages every count is `expected`; with so few that threads lose theirs (and with published pages shared)
    those are that depend on no schedule. Where a success `cancels` siblings, work is what it is: how far a thread has
    run when it is cut off depends on the schedule. A program whose `workers` share a cache needs a lane and a full
    thread's pages for each. Returns the rollout of 16 lanes and ample pages.
    """

    def rollout(engine: ScriptedEngine | ForcedEngine) -> Rollout:
        (done,) = engine.run([(RolloutKey(0, 0), program())])
        assert counted(done).of_any_schedule == expected.of_any_schedule
        return done

    def script() -> TextScript:
        return TextScript({path: list(calls) for path, calls in texts.items()})

    if not cancels:
        done = rollout(ScriptedEngine(script(), max_seq_len=MAX_SEQ_LEN, logprob=logprob))
        assert counted(done).of_work == expected.of_work
    for lanes in (lanes for lanes in (1, 2, 3, 16) if lanes >= workers):
        how = {"lanes": lanes, "max_seq_len": MAX_SEQ_LEN, "logprob": logprob, "max_workers": workers}
        tight = rollout(ForcedEngine(script(), pages=TIGHT * max(1, workers), prefix_reuse=True, **how))
        done = rollout(ForcedEngine(script(), pages=AMPLE, prefix_reuse=False, **how))
        assert done.result == tight.result
        if not cancels:
            assert counted(done).of_work == expected.of_work
    return done


def lengths(*texts: str) -> list[int]:
    """Tokens of each text, without BOS and EOS."""
    return [len(TOKENIZER.encode(text)) for text in texts]


def keys(first: int, last: int) -> int:
    """Keys that the tokens at these positions (counted from 1, both included) attend to: first + ... + last."""
    return sum(range(first, last + 1))
