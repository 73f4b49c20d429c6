"""The meaning of a policy's weights: their tokenizer and the configuration of their training. No JAX.

    RUN/checkpoints/PHASE/STEP/meta       the configuration
    RUN/checkpoints/PHASE/STEP/tokenizer  tokenizer.json, and its special tokens beside it
    HUGGING_FACE/apr_jax.json             the configuration, where this project wrote the folder
    HUGGING_FACE/tokenizer.json           and likewise
    FILE.gguf                             holds both in its metadata

Tokenizers are compared by their content. docs/architecture.md says which fields must agree where.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from apr_jax.checkpoints.integrity import CheckpointError, read_meta
from apr_jax.checkpoints.phases import PHASES, PhaseName, steps_in
from apr_jax.config import ConfigError, ModelConfig
from apr_jax.config_dict import read_model, with_added_fields
from apr_jax.data.tokenizer import AS_IS, Spelling, load_tokenizer, tokenizer_digest
from apr_jax.files import file_in, read_json
from apr_jax.gguf_file import gguf_in, gguf_with_tokenizer, open_gguf, read_gguf_trained
from apr_jax.model.weights.hf_config import TRAINED, read_config
from apr_jax.paths import is_there, local_path, path_of
from apr_jax.tasks import TASKS, named_section

_LOG = logging.getLogger(__name__)

POLICY = "policy"  # the item of a checkpoint that holds the model's parameters
TOKENIZER = "tokenizer"  # its folder with the tokenizer's files
AUTO = "auto"  # as the value of a field: the policy's own

# Fields that decide how prompts and threads read, and so what a policy's weights mean.
_MEANING = (
    *("task.name", "task.context_windows", "data.method", "data.condition_on_budget"),
    *("data.add_marker_tokens", "data.encoding", "data.bos", "data.chat_template"),
)
# Fields of ModelConfig that must agree for weights to fit. The rest may change from one run to the next.
WEIGHT_FIELDS = (
    *("family", "vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"),
    *("rope_theta", "rope_scaling", "rms_norm_eps", "tie_embeddings"),
)

_AUTO_FIELDS = ("data.tokenizer", "data.method", "task.name", "model.family")  # that may say "auto"

_FREE_SETTINGS: dict[str, Any] = {"compute_dtype": "float32", "attention": "auto", "remat": "none"}


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyFolder:
    """The folder of one policy: a checkpoint or a Hugging Face folder, or a GGUF file."""

    path: pathlib.Path
    is_checkpoint: bool

    @property
    def is_gguf(self) -> bool:
        """True for a GGUF file."""
        return not self.is_checkpoint and gguf_in(self.path) == self.path

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """Return the whole configuration that the policy was trained with; None where the folder brings none.

        Raises CheckpointError or FileError for a damaged one.
        """
        if self.is_checkpoint:
            config = read_meta(self.path).get("config")
        elif self.is_gguf:
            config = read_gguf_trained(self.path)
            if config is None:
                return None
        elif (self.path / TRAINED).exists():
            config = read_json(file_in(self.path, TRAINED), "export the policy again")
        else:
            return None
        if not isinstance(config, dict) or not all(
            isinstance(config.get(key), dict) for key in ("model", "data", "task")
        ):
            raise CheckpointError(f"{self.path}: its configuration lacks a section; name another checkpoint of the run")
        return with_added_fields(config)


def refuse_msgpack(path: pathlib.Path) -> None:
    """Raise ConfigError where all weights are in Flax's msgpack, which says nothing of their model."""
    others = ("*.safetensors*", "*.bin", "*.gguf", "checkpoints", "meta")
    found = [path] if path.suffix == ".msgpack" else sorted(path.glob("*.msgpack"))
    if found and not (path.is_dir() and any(any(path.glob(pattern)) for pattern in others)):
        raise ConfigError(
            f"{found[0]} holds the weights of a training code, without a model to put them in: name the checkpoint's "
            "Hugging Face folder, with config.json, tokenizer.json and *.safetensors, or export it to one by that code"
        )


def find_policy(path: pathlib.Path) -> PolicyFolder:
    """Find the policy in a run folder (its newest checkpoint, GRPO's before SFT's), checkpoint or Hugging Face folder.

    Or a GGUF file, or the one in a folder. PATH/best is the checkpoint in PATH with the best validation score. Raises
    FileNotFoundError where there is none, ConfigError for msgpack.
    """
    path = path.absolute()
    refuse_msgpack(path)
    checkpoint = _checkpoint_folder(path)
    if checkpoint is not None:
        return PolicyFolder(checkpoint, True)
    is_run = (path / "checkpoints").is_dir()
    if not is_run and path.exists():
        local_path(path, "a Hugging Face folder or a GGUF file")
    if not is_run and any(any(path.glob(pattern)) for pattern in ("config.json", "*.safetensors*", "*.bin")):
        return PolicyFolder(path, False)
    if not is_run and (file := gguf_in(path)) is not None:
        return PolicyFolder(file, False)
    raise FileNotFoundError(
        f"{path} is neither a run folder, a checkpoint folder, a Hugging Face folder nor a GGUF file"
    )


def own_tokenizer(path: pathlib.Path, config: Mapping[str, Any] | None) -> str | None:
    """Return the tokenizer of the policy at `path` as `load_tokenizer` takes it, or None where its folder has none.

    Args:
      config: the policy's configuration. It names the tokenizer where no file does, as in checkpoints of old versions.
    """
    named = None if config is None else config["data"].get("tokenizer")
    checkpoint = _checkpoint_folder(path.absolute())
    own: pathlib.Path | None = (path if checkpoint is None else checkpoint / TOKENIZER) / "tokenizer.json"
    if own is not None and not is_there(own):
        is_hugging_face = checkpoint is not None or any(path.glob("*.safetensors"))
        own = None if is_hugging_face else gguf_with_tokenizer(path)
    if own is not None:
        return "builtin" if named == "builtin" and same_tokenizer("builtin", str(own)) else str(own)
    is_known = isinstance(named, str) and (named == "builtin" or path_of(named).is_file())
    return named if is_known else None


def same_tokenizer(one: str, other: str, spelling: Spelling = AS_IS) -> bool:
    """Return True if two tokenizers make the same ids of the same text, with the same special tokens.

    Markers that `spelling` adds to a tokenizer make no difference: one of the two may have them already.
    """
    digests = (tokenizer_digest(load_tokenizer(each, spelling)) for each in (one, other))
    return one == other or next(digests) == next(digests)


def agreed_tokenizer(path: pathlib.Path, own: str | None, asked: str | None, spelling: Spelling = AS_IS) -> str:
    """Return the tokenizer of the policy at `path`, as `load_tokenizer` takes it.

    Args:
      own: what the policy's folder brings.
      asked: what the user names; None or "auto" for the policy's own.
      spelling: of the configuration that it is loaded for.
    Raises: ConfigError where they differ, or neither is there.
    """
    asked = None if asked == AUTO else asked
    if own is None and asked is None:
        raise ConfigError(
            f"{path} holds no tokenizer.json, and no other tokenizer is guessed: put there the one that its model was "
            "trained with, or name it with --config.data.tokenizer=FILE (or =builtin)"
        )
    if own is None or asked is None:
        return str(own or asked)
    if not same_tokenizer(own, asked, spelling):
        raise ConfigError(
            f"the policy of {path} has the tokenizer {own}, and data.tokenizer={asked} is another; "
            "--config.data.tokenizer=auto takes the policy's"
        )
    return own


def takes_model(values: Mapping[str, Any]) -> bool:
    """Return True where a configuration takes its model from a policy."""
    return bool(_value(values, "model.family") == AUTO)


def with_auto(values: dict[str, Any], path: pathlib.Path | None) -> dict[str, Any]:
    """Return a configuration's values with the policy's own where they say "auto".

    `data.tokenizer`, `data.method` (with `data.condition_on_budget`), `task.name` (with the whole section) and
    `model.family` (with all that the weights fix) may say so.

    Args:
      path: the policy's folder, None if the user names none.
    Raises: ConfigError where there is no policy to take a field from, or its folder does not tell it.
    """
    wanted = {field for field in _AUTO_FIELDS if _value(values, field) == AUTO}
    if not wanted:
        return values
    data, task, model = (dict(values.get(section) or {}) for section in ("data", "task", "model"))
    if path is None:
        raise ConfigError(f"{min(wanted)}={AUTO!r} takes a policy's: name it with --start or --checkpoint")
    found = find_policy(path)
    saved = found.config
    if "data.tokenizer" in wanted:
        data["tokenizer"] = agreed_tokenizer(path, own_tokenizer(path, saved), None)
    if "model.family" in wanted:
        own = dataclasses.asdict(_model_of(found))
        model |= {field: own[field] for field in WEIGHT_FIELDS}
        if data.get("add_marker_tokens") and data["tokenizer"] != "builtin":
            markers = TASKS[named_section(task)["name"]].marks
            tokenizer = load_tokenizer(data["tokenizer"], Spelling(markers=markers))
            parts = values["mesh"]["tensor"]  # of the vocabulary, all of one size
            model["vocab_size"] = max(model["vocab_size"], -(-tokenizer.vocab_size // parts) * parts)
    return with_training({**values, "data": data, "task": task, "model": model}, saved, str(path))


def with_training(values: dict[str, Any], saved: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """Return a configuration's values with the method and the task of a policy where they say "auto".

    Args:
      saved: the policy's configuration.
      name: what to call the policy.
    Raises: ConfigError where there is none.
    """
    data, task = dict(values["data"]), dict(values["task"])
    if AUTO in (data["method"], task["name"]) and saved is None:
        raise ConfigError(f"{name} does not say which method and task its policy was trained for: name them")
    if saved is not None and data["method"] == AUTO:
        data |= {field: saved["data"][field] for field in ("method", "condition_on_budget")}
    if saved is not None and task["name"] == AUTO:
        task = saved["task"]
    return {**values, "data": data, "task": task}


def note_context(path: pathlib.Path, there: int, here: int) -> None:
    """Warn where threads may hold more tokens than the policy at `path` has ever seen."""
    if here > there:
        _LOG.warning(
            "model.max_seq_len=%d is more than the %d tokens of context that the policy of %s knows; "
            "it may write nonsense beyond them.",
            *(here, there, path),
        )


def note_task(path: pathlib.Path, saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Warn of each setting of the task that the policy at `path` was not trained under.

    Many decide how demonstrations are written. A policy that meets another spelling first loses what it can do, and a
    run without demonstrations keeps settings that are not its policy's. Of another task nothing is compared.

    Args:
      saved: the policy's whole configuration; None: nothing to compare.
      now: the configuration of the run that starts from it.
    """
    there, here = (config.get("task", {}) for config in (saved or {}, now))
    if there.get("name") != here.get("name"):
        return
    lines = _differences((f"task.{name}", there[name], here[name]) for name in here if name in there)
    if lines:
        _LOG.warning(
            "the policy of %s was trained under other settings of the task:\n%s\n"
            "Set them alike to go on with what it writes; SFT under others teaches it to write otherwise.",
            *(path, "\n".join(lines)),
        )


def check_meaning(name: str, saved: Mapping[str, Any] | None, now: Mapping[str, Any], advice: str) -> None:
    """Raise ConfigError where a policy was trained to read or write otherwise than a configuration says.

    Args:
      name: what to call the policy.
      saved: its whole configuration; None, or a field that an older version lacks: nothing to compare.
      now: the configuration to use it under.
      advice: what the user can do.
    """
    fields = ((field, _value(saved, field), _value(now, field)) for field in _MEANING)
    lines = _differences((field, there, here) for field, there, here in fields if there is not None)
    if lines:
        raise ConfigError(f"{name} was trained for something else:\n" + "\n".join(lines) + f"\n{advice}")


def check_model(path: pathlib.Path, there: Mapping[str, Any], here: Mapping[str, Any], *, grows: bool = False) -> None:
    """Raise ConfigError where weights of the policy at `path` are another model's, with each field that differs.

    Where the vocabulary `grows`, that of `here` may be larger.
    """
    if grows and here["vocab_size"] > there["vocab_size"]:
        here = {**here, "vocab_size": there["vocab_size"]}
    lines = _differences((f"model.{name}", there[name], here[name]) for name in WEIGHT_FIELDS)
    if lines:
        raise ConfigError(
            f"the policy of {path} is another model:\n" + "\n".join(lines) + "\n"
            "--config.model.family=auto takes the policy's model"
        )


def _model_of(found: PolicyFolder) -> ModelConfig:
    if found.is_checkpoint and found.config is not None:
        return read_model(found.config["model"])
    if found.is_gguf:
        from apr_jax.model.weights.gguf import read_gguf_config  # imports JAX

        return read_gguf_config(open_gguf(found.path), **_FREE_SETTINGS)
    return read_config(read_json(file_in(found.path, "config.json"), "fetch it again"), **_FREE_SETTINGS)


def _value(config: Mapping[str, Any] | None, field: str) -> Any:
    """Return the value of a field such as "data.method", or None where the configuration lacks it."""
    section, key = field.split(".")
    values = (config or {}).get(section)
    return values.get(key) if isinstance(values, Mapping) else None


def _differences(fields: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return a line for each field whose two values, the policy's and the one of now, are not the same."""
    return [
        f"  {name}: {there!r} there, {here!r} here" for name, there, here in fields if _plain(there) != _plain(here)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checkpoint_folder(path: pathlib.Path) -> pathlib.Path | None:
    """Find the newest checkpoint in a run, phase or checkpoint folder; for PATH/best the best one in PATH.

    Raises FileNotFoundError where the best is asked for and no checkpoint was validated.
    """
    if (path / "meta").is_dir() and (path / POLICY).is_dir():
        return path
    best = path.name == "best" and not path.exists()
    root = path.parent if best else path
    for folder in (root / "checkpoints", root, root.parent):
        for phase in reversed(PHASES):
            inside = folder / phase
            if folder == root.parent and inside != root:  # a phase's own folder
                continue
            steps = [step for step in steps_in(inside) if (inside / str(step) / "meta").is_dir()]
            chosen = _best(inside, phase, steps) if best else max(steps, default=None)
            if chosen is not None:
                return inside / str(chosen)
    if best:
        raise FileNotFoundError(f"no checkpoint in {root} has a validation score, so none is the best")
    return None


def _best(folder: pathlib.Path, phase: PhaseName, steps: list[int]) -> int | None:
    from apr_jax.checkpoints.best import best_step  # slow to import, and few ask for it

    return best_step(folder, phase, steps)
