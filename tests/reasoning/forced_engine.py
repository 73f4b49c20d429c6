"""The engine's own host (programs, scheduler, pages) over a simulated cache, writing prepared completions.

Beside `ScriptedEngine`, which plays the protocol by itself, this one runs the protocol's implementation: children in
lanes side by side, in chunks, with pages that are taken away and computed anew.
"""

from collections.abc import Callable, Sequence

from apr_jax.engine.driver import Driver
from apr_jax.engine.limits import Limits
from apr_jax.engine.scheduler import Scheduler
from apr_jax.engine.threads import Path, Program, Rollout, RolloutKey, Status, Thread
from tests.engine.simulated import Place, SimulatedDevice
from tests.reasoning.fixtures import MODEL
from tests.reasoning.scripted_engine import Complete


class ForcedEngine:
    """Runs programs in visits. `complete` is asked once for each Decode, when its first chunk is due."""

    def __init__(
        self,
        complete: Complete,
        *,
        lanes: int,
        max_seq_len: int,
        pages: int,
        max_total_tokens: int = 10**9,
        prefix_reuse: bool = True,
        max_workers: int = 0,
        logprob: Callable[[Path], float] = lambda path: 0.0,
    ):
        """`logprob` is that of each token which the thread of a path writes."""
        limits = Limits(
            num_shards=1,
            lanes=lanes,
            pages=pages,
            page_size=16,
            max_seq_len=max_seq_len,
            steps_per_visit=16,
            prefill_lanes=2,
            decode_attention="xla",
            page_dtype="compute",
            prefix_reuse=prefix_reuse,
            max_workers=max_workers,
        )
        self.scheduler = Scheduler(limits)
        self._complete = complete
        self._max_total_tokens, self._logprob = max_total_tokens, logprob
        self.model = MODEL
        self._due: dict[Thread, list[int]] = {}
        self.held: list[int] = []  # pages held after each visit

    def run(self, programs: Sequence[tuple[RolloutKey, Program]]) -> list[Rollout]:
        limits = self.scheduler.limits
        run = Driver(
            programs,
            self.scheduler,
            seed=0,
            max_steps=limits.max_seq_len,
            max_total_tokens=self._max_total_tokens,
            now=lambda: 0.0,
        )
        device = SimulatedDevice(self.scheduler)
        while True:
            self.scheduler.admit(run.start_next)
            self.scheduler.check()
            if not self.scheduler.num_running:
                return run.results()
            device.copy()
            device.prefill()
            for thread, tokens in device.decode(self._draw):
                run.decoded(thread, tokens, [self._logprob(thread.path)] * len(tokens))
                if thread.turn.status is not Status.RUNNING:
                    self._due.pop(thread, None)  # what it wrote after a stop string was never drawn
            run.drain()
            self.scheduler.check()
            self.held.append(self.scheduler.cache.allocators[0].num_held)

    def _draw(self, thread: Thread, place: Place) -> list[int]:
        room = min(thread.max_generated - thread.generated, thread.max_length - len(thread.tokens))
        if not room:  # it was to be prefilled
            return []
        due = self._due.get(thread) or list(self._complete(thread.path, list(thread.tokens)))
        count = min(self.scheduler.limits.steps_per_visit, room)
        self._due[thread] = due[count:]
        return due[:count]
