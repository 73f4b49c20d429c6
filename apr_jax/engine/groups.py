"""Groups: workers that decode in lockstep on one cache (Hogwild!, arXiv 2504.06261). No JAX.

A worker is a thread whose tokens are the group's prompt, its own header, and what it then writes. The rules, which make
a rollout a function of weights, seed, temperature, key and program alone, whatever else is in the batch:

* A group starts when all its workers have asked for their Decode. From then on every worker that has not stopped
  writes one token a step; each worker has one Decode.
* Time 0 is the step that reads the last token of every header. At time t a worker reads its token of time t, and sees
  the prompt, its own segment, and the tokens that the others have read at times up to t, t itself included. A header's
  earlier tokens see the prompt and their own header alone; they are visible to all.
* A worker that has stopped stays visible. The token that it stopped with is never read, so nobody sees it.
* A worker whose Decode ends before it begins (a full thread, no tokens left) or that ends without one is no part of the
  cache.

* What a worker sees is at most a context window: what the prompt leaves of it is shared out equally, and a worker that
  has used up its part stops with LENGTH.

A group is admitted as a whole, to one data shard, with all pages that its workers may come to need; it is never
preempted, for what its workers saw of each other could not be computed again by a prefill. So it always runs to its
end, and others wait for it at most as long as it decodes.
"""

import dataclasses
from collections.abc import Sequence

from apr_jax.engine.threads import Thread


@dataclasses.dataclass(eq=False)
class Group:
    """The workers of one `Share`."""

    prompt: tuple[int, ...]
    size: int  # workers started
    undecided: int  # workers that have not asked for their Decode yet, nor ended
    workers: list[Thread] = dataclasses.field(default_factory=list)  # that asked, in spawn order
    headers: dict[Thread, int] = dataclasses.field(default_factory=dict)  # tokens of each worker's header
    stopped: set[Thread] = dataclasses.field(default_factory=set)

    def decide(self, worker: Thread | None) -> bool:
        """Note that a worker asked for its Decode (None: it won't decode). Return True where the group can start."""
        self.undecided -= 1
        if worker is not None:
            self.workers.append(worker)
            self.headers[worker] = len(worker.tokens) - len(self.prompt)
            self.workers.sort(key=lambda thread: thread.path)
        return self.undecided == 0 and bool(self.workers)

    def stop(self, worker: Thread) -> bool:
        """Note that the worker writes no more. Return True where that was the last one."""
        self.stopped.add(worker)
        return len(self.stopped) == len(self.workers)

    def attended_across(self) -> int:
        """Count the keys of other workers that the workers' tokens attended to; each counts those of its own row."""
        return attended_across([(self.headers[worker], worker.cached.work.decoded) for worker in self.workers])


def row_limit(window: int, prompt: int, size: int, number: int) -> int:
    """Return the tokens that worker `number` of `size` may hold, prompt included, so that all fit a window."""
    return prompt + max(0, window - prompt + number) // size


def attended_across(workers: Sequence[tuple[int, int]]) -> int:
    """Count the keys of other workers that all workers attended to, from each one's header tokens and draws.

    At time t a worker that draws sees of another with a header of h tokens and m draws the first min(h + t, h + m - 1)
    tokens.
    """
    total = 0
    for me, (_, mine) in enumerate(workers):
        for other, (header, draws) in enumerate(workers):
            if other != me:
                both = min(mine, draws)
                total += both * header + both * (both - 1) // 2 + (mine - both) * (header + draws - 1)
    return total
