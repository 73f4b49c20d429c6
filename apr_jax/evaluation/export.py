"""A policy for other programs: a Hugging Face folder, or a GGUF file for llama.cpp.

    config.json, model.safetensors        the model, float32 or bfloat16
    tokenizer.json and its settings       with the chat template, if there is one
    generation_config.json                the ids that end a text
    apr_jax.json                          the configuration of the policy's training, where it has one
    dialect.json                          what a server needs to run the policy's spawns
    README.md                             a card for people

A GGUF file holds all that in its metadata. `load_policy` reads both back, weights bit for bit (as they are written).
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from apr_jax.checkpoints.identity import agreed_tokenizer, own_tokenizer
from apr_jax.checkpoints.phases import steps_in
from apr_jax.checkpoints.policy import load_adapters, load_policy
from apr_jax.config import Config, ConfigError, ModelConfig
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.gguf_tokenizer import write_gguf_tokenizer
from apr_jax.data.special_tokens import stated_beside
from apr_jax.data.tokenizer import AS_IS, Spelling, Tokenizer, load_tokenizer
from apr_jax.files import read_json, write, write_json
from apr_jax.gguf_file import TRAINED
from apr_jax.model.families import FAMILIES
from apr_jax.model.params import Params, num_params
from apr_jax.model.weights.gguf_writer import check_type, save_gguf
from apr_jax.model.weights.hf import save_hf
from apr_jax.model.weights.peft import save_peft
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.settings import banned_tokens
from apr_jax.tasks import task_of
from apr_jax.tasks.dialect import SpawnDialect

DIALECT = "dialect.json"
_FOLDER_TYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A policy with all that travels with it."""

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    config: Config | None  # of its training; None: others made it

    @classmethod
    def read(cls, path: pathlib.Path, tokenizer: str | None = None) -> "Exported":
        """Read the policy at `path`, which `tokenizer` may name one for. Raises as `load_policy`, and ConfigError."""
        model, params, saved = load_policy(path)
        config = None if saved is None else from_config_dict(saved)
        spelling = AS_IS if config is None else Spelling.of(config)
        spec = agreed_tokenizer(path, own_tokenizer(path, saved), tokenizer, spelling)
        return cls(model, params, load_tokenizer(spec, spelling), config)


def check_target(out: pathlib.Path, weight_type: str) -> None:
    """Raise ConfigError where a policy cannot be exported to `out`."""
    is_file = out.suffix == ".gguf"
    if is_file:
        check_type(weight_type)
    elif weight_type not in _FOLDER_TYPES:
        raise ConfigError(f"--type={weight_type}: a Hugging Face folder holds F32 or BF16; name a FILE.gguf")
    if out.exists() and (is_file or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out}: there is something already; name a new folder or file")


def export(policy: Exported, out: pathlib.Path, weight_type: str = "F32") -> str:
    """Write a policy to a folder, or to a file with the ending .gguf.

    Args:
      weight_type: of a GGUF's matrices (`gguf_writer.TYPES`), or F32 or BF16 of all tensors in a folder.
    Returns: what the user should know of the result; "" for nothing.
    """
    if out.suffix == ".gguf":
        return _export_gguf(policy, out, weight_type)
    trained = None if policy.config is None else to_dict(policy.config)
    save_hf(out, policy.model, policy.params, policy.tokenizer, trained, _FOLDER_TYPES[weight_type])
    dialect = describe_dialect(policy)
    if dialect is not None:
        write_json(out / DIALECT, dialect)
    write(out / "README.md", _card(policy, out.name, dialect).encode())
    return ""


def export_adapters(checkpoint: pathlib.Path, out: pathlib.Path) -> str:
    """Write the adapters of a checkpoint as a folder of the package `peft`. Returns what they belong to.

    Raises: ConfigError where there are none, and as `load_policy`.
    """
    folder, lora, adapters = load_adapters(checkpoint)
    phase, run = folder.parent.name, folder.parents[2]
    named = read_json(folder.parents[1] / "origins.json", "restore it")[phase]["policy"]
    last = max(steps_in(run / "checkpoints" / "sft"), default=0)
    base = named or str(run / "checkpoints" / "sft" / str(last))  # GRPO went on from its own SFT
    save_peft(out, lora, adapters, base)
    return f"the adapters belong to {base}" + ("" if named else ", which launch/export.py writes as a folder")


def describe_dialect(policy: Exported) -> dict[str, Any] | None:
    """Return what a server needs to run the policy's spawns; None for one that writes none."""
    if policy.config is None:
        return None
    method, rollout = METHODS[policy.config.data.method], policy.config.rollout
    if not issubclass(method.kind, SpawnDialect):
        return None
    dialect, tokenizer = task_of(policy.config).dialect(method.dialect, SpawnDialect), policy.tokenizer
    marks = {"spawn_begin": dialect.spawn_begin, "spawn_end": dialect.spawn_end, "join_begin": dialect.join_begin}
    ids = {name: tokenizer.mark_id(mark) for name, mark in marks.items()}
    return {
        "task": policy.config.task.name,
        "method": method.name,
        "children_begin_from": dialect.children,
        "marks": marks,
        "mark_token_ids": ids,
        "stop_token_ids": [*tokenizer.eos_ids, *([] if ids["spawn_end"] is None else [ids["spawn_end"]])],
        "stop_strings": [dialect.spawn_end] if ids["spawn_end"] is None else [],
        "replaced_text": dict(dialect.replaced),
        "banned_token_ids": list(banned_tokens(tokenizer, policy.model.vocab_size)),
        "limits": {
            name: getattr(rollout, name) for name in ("max_children", "max_spawns", "max_depth", "max_total_children")
        },
    }


def _export_gguf(policy: Exported, out: pathlib.Path, weight_type: str) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        policy.tokenizer.save(folder)
        content = json.loads((folder / "tokenizer.json").read_bytes())
        metadata, reason = write_gguf_tokenizer(
            content, stated_beside(folder / "tokenizer.json"), policy.model.vocab_size
        )
    if policy.config is not None:
        metadata[TRAINED] = json.dumps(to_dict(policy.config))
    if (dialect := describe_dialect(policy)) is not None:
        metadata["apr_jax.dialect"] = json.dumps(dialect)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_gguf(out, policy.model, policy.params, metadata, name=out.stem, weight_type=weight_type)
    return f"{reason}: it runs this model, and takes token ids in place of text" if reason else ""


def _card(policy: Exported, name: str, dialect: Mapping[str, Any] | None) -> str:
    """Write a model card, whose head Hugging Face's Hub reads."""
    model, config = policy.model, policy.config
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", ""),
        f"A {FAMILIES[model.family].architecture} with {num_params(model).total:,} parameters, {model.num_layers} "
        f"layers and a context of {model.max_seq_len:,} tokens, written by apr_jax.",
    ]
    if config is not None:
        lines += ["", f"It was trained on the task `{config.task.name}` with the method `{config.data.method}`."]
    lines += ["", "    from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"    model = AutoModelForCausalLM.from_pretrained({name!r})"]
    lines += [f"    tokenizer = AutoTokenizer.from_pretrained({name!r})"]
    if dialect is not None:
        marks = dialect["marks"]
        lines += [
            "",
            "## Spawns",
            "",
            f"The model asks for child threads between {marks['spawn_begin']!r} and {marks['spawn_end']!r}. A server "
            "stops there, runs each child from the context that the spawn gives it, and replaces the spawn by the "
            f"children's results, which begin with {marks['join_begin']!r}. `{DIALECT}` has the marks, their tokens, "
            "and the limits that it was trained under. `launch/generate.py` of apr_jax does all that.",
        ]
    return "\n".join(lines) + "\n"
