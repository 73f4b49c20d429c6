"""Let a policy write: text in, text out.

    python launch/generate.py 'Once upon a time' --checkpoint=FILE.gguf
    python launch/generate.py --chat 'What is the capital of France?' --checkpoint=HUGGING_FACE_FOLDER
    python launch/generate.py --checkpoint=runs/laptop < prompt.txt          # spawns of its own dialect are run
    python launch/generate.py --chat 'A name for a cat?' --samples=4 --temperature=0.8 --seed=1 --json=-

Words are the prompt, or else standard input is. The text goes to standard output, as it is written where there is one
sample. Threads of spawns are drawn on standard error, live on a terminal and as plain lines elsewhere; the text then
has joins in place of spawns. A policy brings its configuration; --config=FILE and --config.a.b=c are those of
launch/evaluate.py. Exit codes: 0 done; 1 failed; 2 bad arguments or config.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.evaluation.rollout_sources import define_checkpoint, policy_folder

if TYPE_CHECKING:
    from apr_jax.library import Policy, Text

_CONFIG = entry.define_config("grpo.py")
_CHECKPOINT = define_checkpoint()
_CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the policy's chat template, as a user's message.")
_SPAWNS = flags.DEFINE_bool("spawns", None, "Run spawns as threads [where the policy was trained to write them].")
_SAMPLES = entry.define_number("samples", 1, "Texts to write.", 1)
_MAX_TOKENS = entry.define_number("max_tokens", 512, "Tokens that a thread may write.", 1)
_TEMPERATURE = entry.define_number("temperature", 0.0, "0 is greedy.", 0.0)
_SEED = entry.define_number("seed", 0, "Seed of the sampling; unused at temperature 0.", 0)
_JSON = entry.JsonFlag("the texts and their figures")

_PAGE = 16


def main(words: Sequence[str]) -> None:
    # What can be refused is refused at once, before JAX and its friends have loaded.
    _CONFIG.config_dict()
    checkpoint = policy_folder(_CHECKPOINT.value)
    if _SAMPLES.value > 1 and _TEMPERATURE.value == 0:
        raise ConfigError("--samples: at temperature 0 all are the same; set --temperature")
    text = " ".join(words) or sys.stdin.read()
    if not text:
        raise ConfigError("there is no prompt: write it behind the flags, or to standard input")
    policy, has_own = _load(checkpoint)
    tokens = _count_tokens(policy, text)
    if not has_own:
        policy = _sized(policy, tokens)
    spawns = policy.spawns if (has_own if _SPAWNS.value is None else _SPAWNS.value) else None
    if _SPAWNS.value and spawns is None:
        raise ConfigError(f"--spawns: threads of {policy.config.data.method} write no spawns")
    _ = policy.engine  # compiles
    started = time.perf_counter()
    texts = _write(policy, text, tokens, spawns)
    _report(checkpoint, text, texts, time.perf_counter() - started)


def _load(checkpoint: pathlib.Path) -> tuple["Policy", bool]:
    """Load the policy, and tell if it brings a configuration, or the command line names one."""
    from apr_jax import library
    from apr_jax.checkpoints.identity import find_policy

    given, has_own = _CONFIG.config_dict(), _CONFIG.is_given or find_policy(checkpoint).config is not None
    whole = {} if has_own else {"mesh.data": 1, "data.encoding": "whole"}
    chat = {"data.chat_template": "auto"} if _CHAT.value else {}
    policy = library.load(
        checkpoint,
        config=given if _CONFIG.is_given else None,
        fallback=given,
        overrides={"rollout.max_steps": _MAX_TOKENS.value, **whole, **chat, **_CONFIG.overrides},
    )
    return policy, has_own


def _count_tokens(policy: "Policy", prompt: str) -> int:
    """Count the prompt's tokens. Raise ConfigError for one that cannot be written."""
    if _CHAT.value and not policy.tokenizer.chats:
        raise ConfigError("--chat: the policy's tokenizer has no chat template")
    try:
        return len(policy.tokenizer.encode_prompt(prompt))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"the policy's tokenizer cannot spell this prompt: {error}") from error


def _sized(policy: "Policy", prompt_length: int) -> "Policy":
    """Return a policy from elsewhere with an engine that is just large enough."""
    config, samples = policy.config, _SAMPLES.value
    pages = -(-min(config.model.max_seq_len, prompt_length + _MAX_TOKENS.value) // _PAGE)
    context = min(config.model.max_seq_len, pages * _PAGE)
    if prompt_length >= context:
        raise ConfigError(f"the prompt has {prompt_length} tokens, and the policy's context ends at {context}")
    sizes: dict[str, Any] = {"lanes": samples, "pages": samples * pages + 1, "page_size": _PAGE}
    engine = dataclasses.replace(config.engine, prefill_lanes=min(samples, 4), steps_per_visit=8, **sizes)
    model = dataclasses.replace(config.model, max_seq_len=context)
    return dataclasses.replace(policy, config=dataclasses.replace(config, model=model, engine=engine))


def _write(policy: "Policy", prompt: str, tokens: int, spawns: Any) -> list["Text"]:
    from apr_jax.evaluation.live import LiveThreads
    from apr_jax.evaluation.streamed import StreamedText

    how: dict[str, Any] = {"num_samples": _SAMPLES.value, "temperature": _TEMPERATURE.value, "seed": _SEED.value}
    if spawns is None and _SAMPLES.value == 1:
        streamed = StreamedText(policy.tokenizer, tokens, lambda piece: print(piece, end="", flush=True))
        texts = policy.write(prompt, **how, observer=streamed)
        print(flush=True)
        return texts
    with LiveThreads(policy.task, policy.tokenizer) as live:
        texts = policy.write(prompt, **how, spawns=spawns, observer=live)
    for number, each in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)}")
        print(each.text, flush=True)
    return texts


def _report(checkpoint: pathlib.Path, prompt: str, texts: Sequence["Text"], seconds: float) -> None:
    tokens = sum(text.rollout.generated_tokens for text in texts)
    samples = [
        {
            "text": text.text,
            "reason": text.reason,
            "finish_reason": text.reason or "stop",
            "tokens": text.rollout.generated_tokens,
            "tokens_per_second": text.rollout.generated_tokens / max(text.rollout.latency_ms / 1e3, 1e-9),
            "sequential_tokens": text.rollout.sequential_tokens,
            "threads": text.rollout.num_threads,
        }
        for text in texts
    ]
    about: dict[str, Any] = {"temperature": _TEMPERATURE.value, "seed": _SEED.value, "chat": _CHAT.value}
    about |= {"checkpoint": str(checkpoint), "prompt": prompt, "seconds": seconds}
    _JSON.write({**about, **samples[0], "samples": samples})  # programs that ask for one text find it at the top
    threads = sum(text.rollout.num_threads for text in texts)
    cut_off = {text.reason.replace("_", " ") for text in texts if text.reason}
    ending = f"; stopped: {', '.join(sorted(cut_off))}" if cut_off else ""
    in_threads = f" in {threads} threads" if threads > 1 else ""
    print(f"{tokens:,} tokens{in_threads}, {tokens / seconds:,.0f} a second{ending}", file=sys.stderr)


if __name__ == "__main__":
    entry.run_with_words(main)
