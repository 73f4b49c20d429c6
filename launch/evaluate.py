"""Evaluate a policy on held-out problems of its task.

    python launch/evaluate.py                                       # the newest run in runs/
    python launch/evaluate.py --checkpoint=runs/laptop --temperature=1 --json=figures.json
    python launch/evaluate.py --checkpoint=runs/laptop/best         # its best checkpoint by validation
    python launch/evaluate.py --checkpoint=runs/laptop --problems=mine.jsonl --rollouts=threads.jsonl
    python launch/evaluate.py --checkpoint=runs/laptop --method=cons@8:adaptive --temperature=1   # docs/reasoning.md

A policy brings the configuration that it was trained with; --config.a.b=c changes a field of it, and --config=FILE
replaces it. A Hugging Face folder brings its model and, if it has one, its tokenizer.json.
Exit codes: 0 done, 1 failed, 2 bad arguments or config, 75 stopped by a signal.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.config import Config
from apr_jax.evaluation.rollout_sources import (
    check_method_flag,
    choose_policy,
    choose_split,
    define_checkpoint,
    policy_task,
    read_problems,
)
from apr_jax.progress import busy
from apr_jax.tasks.base import SPLITS

_CONFIG = entry.define_config("grpo.py")
_CHECKPOINT = define_checkpoint()
_SPLIT = flags.DEFINE_enum("split", None, list(SPLITS), "Split to take problems from [evaluation.split].")
_NUM_PROBLEMS = entry.define_number("num_problems", None, "Their number [evaluation.num_problems].", low=1)
_PROBLEMS = flags.DEFINE_string("problems", None, 'File: {"numbers": [3, 7, 12], "target": 40} a line, or a JSON list.')
_TEMPERATURE = entry.define_number("temperature", None, "0 is greedy [evaluation.temperature].", low=0.0)
_BUDGET = entry.define_number("budget", None, "Named in prompts: children, or tokens for serial.", low=1)
_METHOD = flags.DEFINE_string("method", None, "Way of reasoning, such as serial or cons@8:adaptive [the policy's own].")
_MAX_TOKENS = entry.define_number(
    "max_tokens", None, "Cut threads off here, unknown to prompts [model.max_seq_len].", low=1
)
_AT_ONCE = entry.define_number(
    "at_once", None, "Problems decoded at once; 1: each has the lanes, and its latency, to itself [all].", low=1
)
_JSON = entry.JsonFlag("the figures")
_ROLLOUTS = entry.define_output("rollouts", "Write the first problems' threads here, one JSON object a rollout.")


def main() -> None:
    # What can be refused is refused at once, before JAX and its friends have loaded.
    checkpoint, config = choose_policy(_CHECKPOINT.value, _CONFIG.values())
    task = policy_task(checkpoint, config, is_given=_CONFIG.is_given)
    if _METHOD.value is not None:
        check_method_flag(_METHOD.value, task, _TEMPERATURE.value, _BUDGET.value)
    own_problems = read_problems(task, _PROBLEMS.value, _NUM_PROBLEMS.value) if _PROBLEMS.value else None
    _evaluate(checkpoint, own_problems)


def _evaluate(checkpoint: pathlib.Path, own_problems: list[Any] | None) -> None:
    with busy("Loading libraries"):
        from apr_jax import library
        from apr_jax.evaluation.run import ShownProgress, evaluate, save_rollouts, show_summary
        from apr_jax.reasoning.settings import make_settings

    given = _CONFIG.config_dict()
    with busy("Reading the policy"):
        policy = library.load(
            checkpoint,
            config=given if _CONFIG.is_given else None,
            fallback=given,
            overrides=_CONFIG.overrides,
        )
    config, tokenizer = policy.config, policy.tokenizer
    temperature = config.evaluation.temperature if _TEMPERATURE.value is None else _TEMPERATURE.value
    method = _METHOD.value or config.data.method
    check_method_flag(method, policy.task, temperature, _BUDGET.value)
    problems, source = (own_problems, _PROBLEMS.value) if own_problems else _problems(config)
    with busy("Compiling the engine"):
        engine = policy.engine_for(method)
    print(f"engine memory: {engine.memory}", file=sys.stderr)
    settings = make_settings(config, tokenizer, method, budget=_BUDGET.value, max_tokens=_MAX_TOKENS.value)
    with ShownProgress(len(problems)) as on_progress:
        summary, records = evaluate(
            engine,
            problems,
            method=method,
            settings=settings,
            seed=config.seed,
            temperature=temperature,
            on_progress=on_progress,
            at_once=_AT_ONCE.value,
        )
    print(f"{checkpoint} on {source}, {method}, temperature {temperature:g}\n{show_summary(summary)}")
    about = {"checkpoint": str(checkpoint), "problems": source, "method": method, "temperature": temperature}
    about |= {"budget": settings.budget, "max_tokens": settings.max_tokens, "at_once": _AT_ONCE.value}
    _JSON.write(summary | about)
    if _ROLLOUTS.value:
        save_rollouts(_ROLLOUTS.value, {checkpoint.name: records})


def _problems(config: Config) -> tuple[list[Any], str]:
    """Return the problems to evaluate on, and their name."""
    from apr_jax.evaluation.run import load_problems

    split, wanted = choose_split(config, _SPLIT.value, _NUM_PROBLEMS.value)
    return load_problems(config, split, wanted), split


if __name__ == "__main__":
    entry.run(main)
