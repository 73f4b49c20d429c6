"""The check that a checkpoint and a configuration belong to one run: which fields must agree, what may grow."""

from typing import Any

from apr_jax.checkpoints.phases import PhaseName
from apr_jax.config import ConfigError
from apr_jax.config_dict import with_added_fields

# The sections that a checkpoint's numbers depend on. The rest (mesh, evaluation, ..) may change between two starts.
_SECTIONS = {
    "sft": ("seed", "model", "task", "data", "lora", "sft"),
    "grpo": ("seed", "model", "task", "data", "lora", "engine", "rollout", "grpo"),
}
# The tokenizer is compared by its content, and not by its place (checkpoints/identity.py).
_FREE = ("data.directory", "data.num_workers", "data.tokenizer", "sft.checkpoint_every", "grpo.checkpoint_every")


def check_same(meta: dict[str, Any], current: dict[str, Any], phase: PhaseName, where: str) -> None:
    """Raise ConfigError when the checkpoint is another phase's, or a field that its numbers depend on differs.

    `num_steps` may differ where it changes no step that is done: with a constant schedule, and not below the step; with
    a trapezoid while its decay has not begun, neither then nor now, and so may `decay_steps`.

    Args:
      meta: what was saved with the checkpoint.
      current: the configuration now.
      where: the checkpoint's folder, for the message.
    """
    if meta["phase"] != phase:
        raise ConfigError(f"{where} is a checkpoint of phase {meta['phase']}, not {phase}")
    then = fields_that_matter(with_added_fields(meta["config"]), phase)
    now = fields_that_matter(current, phase)
    different = {field for field in {*now, *then} if then.get(field) != now.get(field)}
    fixed = _why_length_is_fixed(then, now, phase, meta["step"])
    if fixed is None:
        different -= {f"{phase}.num_steps", f"{phase}.optimizer.decay_steps"}
    if different:
        lines = [f"  {name}: {then.get(name, 'absent')!r} saved, {now.get(name, 'absent')!r} now" for name in different]
        raise ConfigError(
            f"{where} was made with another configuration:\n" + "\n".join(sorted(lines)) + "\n"
            "Restore these fields to go on with it, or choose another --workdir to start anew."
            + (f"\n{fixed}" if f"{phase}.num_steps" in different else "")
        )


def fields_that_matter(config: dict[str, Any], phase: PhaseName, *more_sections: str) -> dict[str, Any]:
    """Return the fields that a phase's numbers depend on, and those of `more_sections`, by dotted name."""
    sections = {*_SECTIONS[phase], *more_sections}
    fields = _leaves(config).items()
    return {name: value for name, value in fields if name.split(".")[0] in sections and name not in _FREE}


def _why_length_is_fixed(then: dict[str, Any], now: dict[str, Any], phase: PhaseName, done: int) -> str | None:
    """Return the reason why a run of `done` steps cannot have another num_steps, None where it can."""
    steps, schedule = now[f"{phase}.num_steps"], then[f"{phase}.optimizer.schedule"]
    if schedule == "trapezoid":
        begins = min(fields[f"{phase}.num_steps"] - fields[f"{phase}.optimizer.decay_steps"] for fields in (then, now))
        if begins >= done:
            return None
        return (
            f"{phase}.num_steps cannot change: {done} steps are done, and the learning rate falls from step {begins} "
            "on, then or now."
        )
    if schedule != "constant":
        return (
            f"{phase}.num_steps cannot change: the {schedule} schedule ends there, so the {done} steps that are done "
            f"would have had other learning rates. Only {phase}.optimizer.schedule='constant' can be extended."
        )
    if steps < done:
        return f"{phase}.num_steps={steps} is less than the {done} steps that are done."
    return None


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves
