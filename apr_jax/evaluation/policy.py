"""The configuration and the tokenizer that a policy is evaluated under."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from apr_jax.checkpoints.identity import (
    AUTO,
    WEIGHT_FIELDS,
    agreed_tokenizer,
    check_meaning,
    note_context,
    own_tokenizer,
    with_training,
)
from apr_jax.config import Config, ConfigError, ModelConfig
from apr_jax.config_dict import from_config_dict
from apr_jax.config_fields import BY_DEVICES
from apr_jax.data.tokenizer import Spelling, Tokenizer, config_tokenizer
from apr_jax.reasoning import METHODS
from apr_jax.tasks import task_of
from apr_jax.tasks.dialect import Dialect

# What may differ between training and evaluation; the rest of a model's config is its weights' shape and meaning.
_FREE = ("compute_dtype", "attention", "remat", "max_seq_len")


def choose_config(
    model: ModelConfig, saved: Mapping[str, Any] | None, given: ConfigDict | None, overrides: Mapping[str, Any]
) -> Config:
    """Return the configuration to evaluate a policy under.

    Args:
      model: the policy's own.
      saved: the whole configuration it was trained with, None where it brings none.
      given: a config named on the command line, which then takes the saved one's place. One of the two is needed.
        Where its `model.family` is auto, what no weight fixes is its own (the context, the dtype).
      overrides: {"engine.lanes": 8}, applied to either.
    Raises:
      ConfigError: an override that fits no field; one, or a configuration given, that contradicts the policy's weights
        or what it was trained for; a saved configuration that another version wrote, whose fields are not today's.
    """
    base = given if given is not None else saved
    if base is None:
        raise ConfigError("this policy brings no configuration: name one (config=, or --config=FILE)")
    if given is None:
        _check_version(base)
    values, own = ConfigDict(base), dataclasses.asdict(model)
    if given is None and (values.mesh.data, values.mesh.fsdp) != (1, 1):
        values.mesh.update(data=BY_DEVICES, fsdp=1)  # the devices that it was trained on need not be those of here
    takes_free = given is not None and given.model.family == AUTO
    values.model = {**values.model, **{name: own[name] for name in WEIGHT_FIELDS}} if takes_free else own
    for field, value in overrides.items():
        section, _, name = field.rpartition(".")
        if (field, value) == ("model.family", AUTO):
            continue
        if section == "model" and name not in _FREE and getattr(model, name, value) != value:
            raise ConfigError(f"{field}={value} contradicts the policy's weights, which have {getattr(model, name)}")
        parent: Any = values
        for part in section.split(".") if section else []:
            parent = parent[part]
        parent[name] = value
    longest = max(values.model.max_seq_len, values.sft.row_len, values.grpo.row_len)
    values.sft.row_len = values.grpo.row_len = longest  # read in training only
    now = with_training(values.to_dict(), saved, "this policy")
    check_meaning("the policy", saved, now, "Leave them to the policy; --method chooses another way of reasoning.")
    return from_config_dict(now)


def _check_version(saved: Mapping[str, Any]) -> None:
    try:
        from_config_dict(saved)
    except ConfigError as error:
        raise ConfigError(
            f"the policy's saved configuration is of another version ({error}): name one in its place, as with "
            "--config=configs/grpo.py"
        ) from error


def configure(
    folder: pathlib.Path,
    model: ModelConfig,
    saved: Mapping[str, Any] | None,
    given: ConfigDict | None,
    overrides: Mapping[str, Any],
) -> tuple[Config, Tokenizer]:
    """Return the configuration and the tokenizer to evaluate the policy in `folder` under.

    The tokenizer is the policy's own. An override, or a configuration in place of the policy's, may name it as well.
    What a configuration says beside a Hugging Face folder that brings none of its own is not about the policy.

    Args: as of `choose_config`.
    Raises: ConfigError as `choose_config`, for another tokenizer than the policy's, and for none.
    """
    asked = overrides.get("data.tokenizer")
    if asked is None and given is not None and saved is not None:
        asked = given.data.tokenizer
    own = own_tokenizer(folder, saved)
    config = choose_config(model, saved, given, {**overrides, "data.tokenizer": asked or own or AUTO})
    tokenizer = agreed_tokenizer(folder, own, asked, Spelling.of(config))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    note_context(folder, model.max_seq_len, config.model.max_seq_len)
    loaded = config_tokenizer(config)
    try:
        check_vocabulary(config.model, loaded)
        check_spelling(config, loaded)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    return config, loaded


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the tokenizer has ids that the model lacks."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} ids (with marks "
            "of spawns and joins): this tokenizer is not the policy's, or the model needs more embeddings. Without "
            "data.add_marker_tokens no mark is added; with it and --config.model.family=auto, training grows the model"
        )


def check_spelling(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the tokenizer cannot write an example of the task's prompts, or a mark of its dialect."""
    task = task_of(config)
    dialect = task.dialect(METHODS[config.data.method].dialect, Dialect)
    prompt = dialect.opening(task.read_words(task.example.split()))
    try:
        tokenizer.encode(prompt)
    except ValueError as error:
        raise ConfigError(f"no tokenizer for the problems of {task.name}: {error}; name another") from error
    for mark in dialect.marks:
        try:
            if tokenizer.mark_id(mark) is None:
                tokenizer.encode(mark)
        except ValueError as error:
            raise ConfigError(
                f"the tokenizer has no token for the mark {mark!r} and cannot spell it ({error}): set "
                "data.add_marker_tokens=True, with which training adds one, or name another tokenizer"
            ) from error
