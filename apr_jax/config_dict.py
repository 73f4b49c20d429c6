"""The one door from ConfigDict: an `ml_collections.ConfigDict` becomes a `Config`, strictly.

An unknown or missing field and a value of the wrong type raise `ConfigError` and say what was probably meant. Nothing
downstream sees a ConfigDict.
"""

import dataclasses
import difflib
import random
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from apr_jax.config import Config, ConfigError, LoraConfig, ModelConfig, TaskConfig, check_choice, check_range, shown
from apr_jax.config_fields import number_range
from apr_jax.model.families import FAMILIES
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.settings import spelled_spawns
from apr_jax.tasks import TASKS, named_section, task_of
from apr_jax.tasks.base import HELD_OUT_SPLITS, TaskLacksError

# Fields that are younger than some saved policies, each with the value that has the effect of before it was there.
_ADDED = {
    "engine.page_dtype": "compute",
    "data.children_share": 1.0,
    "task.search_order": "breadth_first",
    "task.restate": False,
    "task.restate_operation": False,
    "task.attempts": False,
    "task.parent_replay": "root",
    "task.cancel_on_success": False,
    "grpo.overlap": 0,
}


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Convert a ConfigDict (or nested dict) to a Config. Raise ConfigError; never fill in a default."""
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    converted: Config = _convert(Config, values, "")
    if converted.model.family == "auto":
        raise ConfigError(
            f"model.family='auto' takes a policy's, and none is read here: name one of {', '.join(FAMILIES)}"
        )
    check_choice("model.family", converted.model.family, FAMILIES)
    _check_method(converted)
    return converted


def with_added_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy's saved configuration with the fields that were added after it was written."""
    completed = dict(saved)
    for field, value in _ADDED.items():
        section, _, name = field.partition(".")
        there = completed.get(section)
        if isinstance(there, Mapping) and (section != "task" or name in _task_fields(there)):
            completed[section] = {name: value, **there}
    return completed


def _task_fields(section: Mapping[str, Any]) -> set[str]:
    """Return the names of the fields that a saved task's section has today; none for a task that there is not."""
    task = TASKS.get(str(section.get("name")))
    return {field.name for field in dataclasses.fields(task.section)} if task else set()


def read_model(values: Any) -> ModelConfig:
    """Convert a saved model's section. Raise ConfigError as `from_config_dict`."""
    model: ModelConfig = _convert_value(ModelConfig, values, "model")
    check_choice("model.family", model.family, FAMILIES)
    return model


def read_lora(values: Any) -> LoraConfig:
    """Convert a saved section of adapters. Raise ConfigError as `from_config_dict`."""
    lora: LoraConfig = _convert_value(LoraConfig, values, "lora")
    return lora


def to_dict(config: Any) -> dict[str, Any]:
    """Return the nested plain dict that `from_config_dict` takes back, as JSON has it: tuples become lists."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {key: list(v) if isinstance(v, tuple) else v for key, v in items}
    )


def _convert(cls: type, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in hints]
    missing = [key for key in hints if key not in values]
    if unknown:
        close = difflib.get_close_matches(
            str(unknown[0]), missing or hints, n=1, cutoff=0.4
        ) or difflib.get_close_matches(str(unknown[0]), hints, n=1, cutoff=0)
        hint = f"did you mean {close[0]}?" if close else f"fields: {', '.join(hints)}"
        raise ConfigError(f"{path}{unknown[0]}: no such field; {hint}")
    if missing:
        raise ConfigError(f"{path}{missing[0]}: missing; it takes {_type_name(hints[missing[0]])}")
    return cls(**{key: _convert_value(hint, values[key], f"{path}{key}") for key, hint in hints.items()})


def _convert_value(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, types.UnionType):  # a section or None
        (section,) = (choice for choice in typing.get_args(hint) if choice is not type(None))
        return None if value is None else _convert_value(section, value, path)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={shown(value)}: wrong type, it takes a section of settings")
        value = named_section(value) if hint is TaskConfig else value
        section = _task_section(value) if hint is TaskConfig else typing.cast(type, hint)
        return _convert(section, value, f"{path}.")
    if typing.get_origin(hint) is Literal:
        check_choice(path, value, typing.get_args(hint))
        return value
    if typing.get_origin(hint) is tuple:
        item_hint = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={shown(value)}: wrong type, it takes a list of {_type_name(item_hint)}")
        return tuple(_convert_value(item_hint, item, f"{path}[{i}]") for i, item in enumerate(value))
    allowed = number_range(hint)
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise ConfigError(f"{path}={shown(value)}: wrong type, it takes {_type_name(hint)}, not {type(value).__name__}")
    if allowed is None:
        return value
    check_range(path, value, allowed)
    return hint(value)


def _task_section(value: Mapping[str, Any]) -> type[TaskConfig]:
    """Return the dataclass that the named task declares for its section."""
    if "name" not in value:
        raise ConfigError(f"task.name: missing; name one of {', '.join(TASKS)}")
    check_choice("task.name", value["name"], TASKS)
    return TASKS[value["name"]].section


def _type_name(hint: Any) -> str:
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return getattr(hint, "__name__", str(hint))


def _check_method(config: Config) -> None:
    """Check that the task has problems, and what the method and the rest of the configuration ask of it."""
    data, task = config.data, task_of(config)
    check_choice("data.method", data.method, METHODS)
    method = METHODS[data.method]
    task.dialect(method.name, method.kind)
    if data.condition_on_budget and method.budget is None:
        raise ConfigError(f"data.condition_on_budget=True: data.method={data.method!r} has no budget to name")
    if config.rollout.constrain_spawns:
        try:
            spelled_spawns(config)
        except TaskLacksError as error:
            raise TaskLacksError(f"rollout.constrain_spawns=True: {error}") from error
    if data.facts_share:
        task.draw_fact(random.Random(0), config.task)
    for split in HELD_OUT_SPLITS:  # a problem of each can be drawn, or the task says why not; train's may be a file's
        task.sampler(config, split)(random.Random(0))
