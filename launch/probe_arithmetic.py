"""Measure what a policy gets right along demonstrations of fresh problems.

Its arithmetic by operator and by size of operands, then all tokens by who writes and what they say, then the lines that
a parent lists for its children by their place in the list.

    python launch/probe_arithmetic.py --checkpoint=runs/countdown4
    python launch/probe_arithmetic.py --checkpoint=runs/countdown4/best --num_problems=200 --json=arithmetic.json

Exit codes: 0 done, 1 failed, 2 bad arguments.
"""

import dataclasses
import random

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError, MeshConfig
from apr_jax.evaluation.rollout_sources import given_policy

_CONFIG = entry.define_config("countdown4.py")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run (or RUN/best) or checkpoint folder.", required=True)
_NUM_PROBLEMS = entry.define_number("num_problems", 100, "Problems whose demonstrations are read.", low=1)
_JSON = entry.JsonFlag("the figures")


def main() -> None:
    checkpoint = given_policy(_CHECKPOINT.value)
    from apr_jax.bench.arithmetic import probe_arithmetic
    from apr_jax.checkpoints.policy import load_policy
    from apr_jax.evaluation.policy import configure
    from apr_jax.model.placement import place_params
    from apr_jax.parallel.mesh import make_mesh
    from apr_jax.tasks.countdown.config import CountdownConfig
    from apr_jax.tasks.countdown.rules import sample_problem
    from apr_jax.tasks.generation import demonstrate

    model, params, saved = load_policy(checkpoint)
    given = _CONFIG.config_dict() if _CONFIG.is_given or saved is None else None
    config, tokenizer = configure(checkpoint, model, saved, given, _CONFIG.overrides)
    if not isinstance(config.task, CountdownConfig):
        raise ConfigError(f"task.name={config.task.name!r}: the probe reads Countdown's operations")
    task = dataclasses.replace(config.task, context_windows=())  # naming them would need token counts
    demonstrations = []
    for index in range(_NUM_PROBLEMS.value):
        rng = random.Random(f"{config.seed}/probe/{index}")
        demonstrations.append(demonstrate(sample_problem(rng, task), rng, task, "adaptive", False))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    params = place_params(params, mesh, model)
    probe = probe_arithmetic(params, model, mesh, tokenizer, demonstrations)
    for label, share in [*probe.results.items(), *probe.tokens.items(), *probe.places.items()]:
        print(f"{label:30} {share}")
    _JSON.write(dataclasses.asdict(probe))


if __name__ == "__main__":
    entry.run(main)
