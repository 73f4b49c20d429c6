"""No search: the answer straight, as a path of operations (what searching is worth is measured against this).

Source: models trained on optimal paths alone, in Stream of Search (Gandhi et al. 2024, arXiv 2404.03683).
What differs: the path is written in the grammar of the other methods' replays, states between its steps included, and
it is the first solution in a fixed order, not the shortest trace of a search.
"""

from collections.abc import Generator
from typing import Any

from apr_jax.engine.threads import Decode, Open, StopReason
from apr_jax.reasoning.outcome import Outcome, Settings, prompt_tokens, thread_text, truncated_reason
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.rules import Problem


def direct(problem: Problem, settings: Settings) -> Generator[Any, Any, Outcome]:
    """One thread to EOS; all of it is the answer.

    A thread that does not end by claiming the goal is malformed ("unfinished").
    """
    tokenizer = settings.tokenizer
    thread = yield Open(prompt_tokens(tokenizer, trace.parent_prompt(problem)))
    stop = yield Decode(thread, (tokenizer.eos_id,))
    if stop.reason is not StopReason.TOKEN:
        return Outcome(answer=None, status="truncated", reason=truncated_reason(stop))
    answer = trace.read_path(thread_text(tokenizer, thread))
    if answer is None:
        return Outcome(answer=None, status="malformed", reason="unfinished")
    return Outcome(answer=answer, status="answered", reason="")
