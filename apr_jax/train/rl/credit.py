"""Credit: the share that each call has in its rollout's advantage (`grpo.credit`)."""

import numpy as np

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Call, Rollout, StopReason
from apr_jax.tasks.base import Task


def every_call(rollout: Rollout, tokenizer: Tokenizer, task: Task) -> np.ndarray:
    """Give every call the whole advantage, as the paper does (`credit="rollout"`): float64, one a call."""
    return np.ones(len(rollout.calls))


def used_threads(rollout: Rollout, tokenizer: Tokenizer, task: Task) -> np.ndarray:
    """Give the advantage to the calls of the root and of every *used* thread (`credit="used"`): 1 for these, else 0.

    A thread below the root is used if it handed back a winning path and the rollout's answer contains that path, word
    for word. So a solved rollout credits the root and the chain of threads that found the solution. An answer from a
    child's wrong path blames that child with the root. A child whose right path the parent miscopied is not blamed. A
    child that found nothing, or a path that nobody took up, has no part in the policy loss. The weights (N, n_r, token
    counts) still count every call, and so does the KL term.

    Raises TaskLacksError for a task whose answers do not repeat what children hand back.
    """
    answer: str | None = rollout.result.answer
    last = {call.path: call for call in rollout.calls}
    used = {path for path, call in last.items() if not path or _is_used(call, answer, tokenizer, task)}
    return np.asarray([float(call.path in used) for call in rollout.calls])


CREDITS = {"rollout": every_call, "used": used_threads}


def _is_used(last: Call, answer: str | None, tokenizer: Tokenizer, task: Task) -> bool:
    """Tell whether the answer repeats what a thread handed back that ended with the call `last`."""
    text = tokenizer.decode([*last.context.tolist()[1:], *last.tokens.tolist()[:-1]])
    path = task.handed_back(text)
    ended = last.stop.reason is StopReason.TOKEN and last.stop.token in tokenizer.eos_ids
    return ended and answer is not None and path is not None and path in answer
