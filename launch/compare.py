"""Compares policies on the same held-out problems, each with the first, with paired 95 % intervals.

    python launch/compare.py --policies=correct=runs/correct,path=runs/path --num_problems=1000
    python launch/compare.py --policies=correct=runs/correct,path=runs/path --figure=docs/critical_path.svg

All decode under the first one's configuration; --config.a.b=c changes a field of it. --figure draws the training curves
of those that are run folders. Exit codes: 0 done, 1 failed, 2 bad arguments or config.
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.evaluation.sources import check_policy_folder
from apr_jax.tasks.generation import SPLITS, Split

_CONFIG = entry.define_config("grpo.py")
_POLICIES = flags.DEFINE_list("policies", [], "NAME=FOLDER of two or more: run, checkpoint or Hugging Face folders.")
_SPLIT = flags.DEFINE_enum("split", None, list(SPLITS), "Which problems [evaluation.split].")
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", None, "How many [evaluation.num_problems].", lower_bound=2)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy [evaluation.temperature].", lower_bound=0.0)
_JSON = flags.DEFINE_string("json", None, "Write summaries and differences here as one JSON object.")
_FIGURE = flags.DEFINE_string("figure", None, "Write the runs' training curves here, as an SVG.")


def main() -> None:
    _CONFIG.config()  # what can be refused is refused before JAX and its friends have loaded
    folders = {name: pathlib.Path(folder) for name, _, folder in (given.partition("=") for given in _POLICIES.value)}
    if len(folders) < 2:
        raise ConfigError("--policies takes two or more different names: first=runs/a,second=runs/b")
    for name, folder in folders.items():
        check_policy_folder(folder, f"policies={name}")
    from apr_jax.data.countdown_builder import DatasetError
    from apr_jax.evaluation.compare import draw_runs
    from apr_jax.model.hf import HuggingFaceError
    from apr_jax.train.integrity import CheckpointError

    if _FIGURE.value:
        try:
            draw_runs(folders, pathlib.Path(_FIGURE.value))
        except ValueError as error:
            raise entry.FailedError(str(error)) from error
    try:
        _compare(folders)
    except (CheckpointError, DatasetError, FileNotFoundError, HuggingFaceError) as error:
        raise entry.FailedError(str(error)) from error


def _compare(folders: dict[str, pathlib.Path]) -> None:
    from apr_jax.evaluation.compare import compare
    from apr_jax.evaluation.run import show_summary

    summaries, records = _evaluate_all(folders)
    for name, summary in summaries.items():
        print(f"{name}: {folders[name]}\n{show_summary(summary)}\n")
    first, *others = folders
    differences = {name: compare(records[first], records[name]) for name in others}
    for name, of_figures in differences.items():
        print(f"{name} against {first} (95 %, paired):")
        for figure, d in of_figures.items():
            scale, unit = (100, " points") if figure == "accuracy" else (1, "")
            change = f"{scale * d.change:+.1f}{unit} ({scale * d.change_low:+.1f} to {scale * d.change_high:+.1f})"
            relative = f"{d.relative:+.1%} ({d.relative_low:+.1%} to {d.relative_high:+.1%})"
            print(f"  {figure:18} {scale * d.first:.1f} -> {scale * d.second:.1f}: {change}, {relative}")
    if _JSON.value:
        plain = {name: {k: dataclasses.asdict(d) for k, d in of.items()} for name, of in differences.items()}
        document = {"against": first, "summaries": summaries, "differences": plain}
        pathlib.Path(_JSON.value).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _evaluate_all(folders: dict[str, pathlib.Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and records of each policy, on one engine."""
    from apr_jax.data.tokenizer import load_tokenizer
    from apr_jax.evaluation.policy import check_vocabulary, choose_config
    from apr_jax.evaluation.run import ShownProgress, evaluate, load_problems
    from apr_jax.parallel.mesh import make_mesh, offer_cpu_devices
    from apr_jax.reasoning.outcome import make_settings
    from apr_jax.reasoning.policy_engine import policy_engine
    from apr_jax.train.checkpoint import load_policy

    offer_cpu_devices()
    policies = {name: load_policy(folder) for name, folder in folders.items()}
    model, first_params, saved = next(iter(policies.values()))
    given = _CONFIG.config_dict() if _CONFIG.is_given or saved is None else None
    config = choose_config(model, saved, given, _CONFIG.overrides)
    tokenizer = load_tokenizer(config.data.tokenizer)
    evaluation = config.evaluation
    temperature = evaluation.temperature if _TEMPERATURE.value is None else _TEMPERATURE.value
    split: Split = _SPLIT.value or evaluation.split  # type: ignore[assignment]
    problems = load_problems(config, split, _NUM_PROBLEMS.value or evaluation.num_problems)
    check_vocabulary(config.model, tokenizer)
    for name, (other, _, _) in policies.items():
        if dataclasses.replace(other, max_seq_len=model.max_seq_len) != model:
            raise ConfigError(f"--policies: {name} is another model than {next(iter(policies))}")
    engine = policy_engine(config, make_mesh(config.mesh), tokenizer, first_params)
    engine.warm_up()  # so that no rate or latency counts compilation
    summaries, records = {}, {}
    for name, (_, params, _) in policies.items():
        engine.set_params(params)
        with ShownProgress(len(problems), f"Evaluate {name}") as on_progress:
            summaries[name], records[name] = evaluate(
                engine,
                tokenizer,
                problems,
                method=config.data.method,
                settings=make_settings(config, tokenizer),
                seed=config.seed,
                temperature=temperature,
                on_progress=on_progress,
                keep_calls=0,
            )
    return summaries, records


if __name__ == "__main__":
    entry.run(main)
