"""Credit: the share that each call has in its rollout's advantage (`grpo.credit`)."""

import numpy as np

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Call, Rollout, StopReason
from apr_jax.tasks.countdown import trace


def every_call(rollout: Rollout, tokenizer: Tokenizer) -> np.ndarray:
    """Give every call the whole advantage, as the paper does (`credit="rollout"`): float64, one a call."""
    del tokenizer
    return np.ones(len(rollout.calls))


def used_threads(rollout: Rollout, tokenizer: Tokenizer) -> np.ndarray:
    """Give the advantage to the calls of the root and of every *used* thread (`credit="used"`): 1 for these, else 0.

    A thread below the root is used if it handed back a winning path and the rollout's answer contains that path, word
    for word. So a solved rollout credits the root and the chain of threads that found the solution. An answer from a
    child's wrong path blames that child with the root. A child whose right path the parent miscopied is not blamed. A
    child that found nothing, or a path that nobody took up, has no part in the policy loss. The weights (N, n_r, token
    counts) still count every call, and so does the KL term.
    """
    answer: str | None = rollout.result.answer
    last = {call.path: call for call in rollout.calls}
    used = {path for path, call in last.items() if not path or _is_used(call, answer, tokenizer)}
    return np.asarray([float(call.path in used) for call in rollout.calls])


CREDITS = {"rollout": every_call, "used": used_threads}


def _is_used(last: Call, answer: str | None, tokenizer: Tokenizer) -> bool:
    path = None if answer is None else _winning_path(last, tokenizer)
    return answer is not None and path is not None and path in answer


def _winning_path(last: Call, tokenizer: Tokenizer) -> str | None:
    """Return the winning path that a thread handed back with its last call, or None if it handed back none."""
    if last.stop.reason is not StopReason.TOKEN or last.stop.token != tokenizer.eos_id:
        return None
    text = tokenizer.decode([*last.context.tolist()[1:], *last.tokens.tolist()[:-1]])
    result = trace.read_child_result(text, trace.thread_node(text) or "")
    return None if isinstance(result, trace.Malformed) else result.path
