"""SoS+: the same kind of search in one thread, as a stream of text (the paper's serial baseline, section 4.1)."""

from collections.abc import Generator
from typing import Any

from apr_jax.engine.threads import Decode, Open, StopReason
from apr_jax.reasoning.outcome import Outcome, Settings, prompt_tokens, read_ending, thread_text, truncated_reason
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.rules import Problem


def serial(problem: Problem, settings: Settings) -> Generator[Any, Any, Outcome]:
    """One thread to EOS. A thread that is cut off ends as "truncated", with the reason."""
    tokenizer = settings.tokenizer
    thread = yield Open(prompt_tokens(tokenizer, trace.serial_prompt(problem, settings.budget)))
    stop = yield Decode(thread, (tokenizer.eos_id,))
    if stop.reason is not StopReason.TOKEN:
        return Outcome(answer=None, status="truncated", reason=truncated_reason(stop))
    answer, status, reason = read_ending(thread_text(tokenizer, thread))
    return Outcome(answer=answer, status=status, reason=reason)
