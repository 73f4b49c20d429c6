"""Checks of what several sections of the configuration must agree on. Each yields a message with what disagrees."""

import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from apr_jax.config_fields import BY_DEVICES, LEAST_TEMPERATURE

if TYPE_CHECKING:
    from apr_jax.config import Config

_IN_STORE = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/")


def disagreements(config: "Config") -> Iterator[str]:
    """Yield what is wrong with a configuration whose sections are right on their own, the likeliest cause first."""
    yield from _names(config)
    yield from _mesh(config)
    yield from _lengths(config)
    yield from _windows(config)
    yield from _problems(config)
    yield from _overlap(config)
    yield from _sampling(config)
    yield from _adapters(config)


def futile(config: "Config") -> Iterator[str]:
    """Yield what a run would fail at, or do in vain, with a configuration in which nothing disagrees."""
    data, grpo, evaluation = config.data, config.grpo, config.evaluation
    local = data.tokenizer != "builtin" and not _IN_STORE.match(data.tokenizer)
    if local and not pathlib.Path(data.tokenizer).exists():
        yield f'data.tokenizer={data.tokenizer}: no such file; name a tokenizer.json, or "builtin"'
    if grpo.num_steps and grpo.prompts_per_step > data.num_train:
        yield f"grpo.prompts_per_step={grpo.prompts_per_step} is more than data.num_train={data.num_train}"
    there = getattr(data, f"num_{evaluation.split}")
    if evaluation.num_problems > there:
        yield f"evaluation.num_problems={evaluation.num_problems} is more than data.num_{evaluation.split}={there}"
    if grpo.num_steps and config.rollout.temperature < LEAST_TEMPERATURE:
        yield (
            f"rollout.temperature={config.rollout.temperature}: GRPO learns from how rollouts of a problem differ, and "
            "greedy ones are all the same; set a temperature above 0, or grpo.num_steps=0"
        )
    for name, phase in (("sft", config.sft), ("grpo", grpo)):
        optimizer = phase.optimizer
        if phase.num_steps and optimizer.name == "muon" and not optimizer.muon_learning_rate:
            yield f"{name}.optimizer.muon_learning_rate=0.0: Muon would leave all matrices as they are"


def _names(config: "Config") -> Iterator[str]:
    name, data = config.name, config.data
    if name in ("", ".", "..") or not name.isprintable() or {*name} & {*"/\\"} or len(name.encode()) > 200:
        yield f"name={name[:100]!r} must be a plain name, without separators: it names the run's folder"
    if _IN_STORE.match(data.directory):
        yield (
            f"data.directory={data.directory}: the data set must lie on this machine, where its records are read by "
            "their place; name a folder here (hosts may each have their own)"
        )
    for field, path in (("directory", data.directory), ("tokenizer", data.tokenizer)):
        if not path or not path.isprintable():
            yield f"data.{field}={path[:100]!r} must be a path"


def _mesh(config: "Config") -> Iterator[str]:
    model, mesh, shards = config.model, config.mesh, config.mesh.row_shards
    for field, size in (
        ("num_kv_heads", model.num_kv_heads),
        ("num_heads", model.num_heads),
        ("mlp_dim", model.mlp_dim),
        ("vocab_size", model.vocab_size),
    ):
        if size % mesh.tensor:
            yield f"model.{field}={size} must be a multiple of mesh.tensor={mesh.tensor}"
    if model.embed_dim % mesh.fsdp:
        yield f"model.embed_dim={model.embed_dim} must be a multiple of mesh.fsdp={mesh.fsdp}"
    for field, rows in (
        ("sft.rows_per_step / sft.microbatches", config.sft.rows_per_step // config.sft.microbatches),
        ("grpo.rows_per_microbatch", config.grpo.rows_per_microbatch),
    ):
        if rows % shards:
            axes = "mesh.fsdp" if mesh.data == BY_DEVICES else "mesh.data * mesh.fsdp"
            yield f"{field}={rows} must be a multiple of {axes} = {shards}"


def _lengths(config: "Config") -> Iterator[str]:
    longest, engine = config.model.max_seq_len, config.engine
    pages_per_thread = -(-longest // engine.page_size)
    if engine.pages != BY_DEVICES and engine.pages - 1 < pages_per_thread:
        yield (
            f"engine.pages={engine.pages} leaves {engine.pages - 1} usable pages a data shard, and one thread of "
            f"model.max_seq_len={longest} tokens needs {pages_per_thread} of engine.page_size={engine.page_size}"
        )
    for name, row_len in (("sft", config.sft.row_len), ("grpo", config.grpo.row_len)):
        if row_len < longest:
            yield (
                f"{name}.row_len={row_len} is shorter than model.max_seq_len={longest}: a full thread would not fit "
                "a row"
            )


def _windows(config: "Config") -> Iterator[str]:
    windows, window, longest = config.task.windows, config.rollout.context_window, config.model.max_seq_len
    if windows and windows[-1] > longest:
        yield f"task.context_windows={windows} holds one above model.max_seq_len={longest}"
    if window not in (0, *windows):
        yield (
            f"rollout.context_window={window} must be 0 or one of task.context_windows={windows}, "
            "which demonstrations name"
        )


def _problems(config: "Config") -> Iterator[str]:
    grpo, data = config.grpo, config.data
    if grpo.validate_every and grpo.validation_problems > data.num_validation:
        yield (
            f"grpo.validation_problems={grpo.validation_problems} is more than data.num_validation="
            f"{data.num_validation}"
        )
    most_prompts = grpo.prompts_per_step * (1 + grpo.max_resamples)
    if grpo.max_resamples and most_prompts > data.num_train:
        yield (
            f"grpo.max_resamples={grpo.max_resamples} may ask for {most_prompts} problems in a step, and "
            f"data.num_train={data.num_train}"
        )


def _overlap(config: "Config") -> Iterator[str]:
    grpo, together = config.grpo, 1 + config.grpo.overlap
    if not grpo.overlap:
        return
    if grpo.importance_cap == 0:
        yield (
            f"grpo.overlap={grpo.overlap} learns from rollouts of an earlier policy, which importance weights correct: "
            "set grpo.importance_cap (2.0, say)"
        )
    for field in ("num_steps", "checkpoint_every", "validate_every"):
        if getattr(grpo, field) % together:
            yield (
                f"grpo.{field}={getattr(grpo, field)} must be a multiple of grpo.overlap + 1 = {together}, the steps "
                "whose rollouts are drawn together"
            )


def _sampling(config: "Config") -> Iterator[str]:
    rollout = config.rollout
    for field, value, off in (("top_k", rollout.top_k, 0), ("top_p", rollout.top_p, 1), ("min_p", rollout.min_p, 0)):
        if rollout.constrain_spawns and value != off:
            yield (
                f"rollout.{field}={value} and rollout.constrain_spawns=True: spawns are held to their grammar on the "
                f"whole policy; set rollout.{field}={off}, or rollout.constrain_spawns=False"
            )


def _adapters(config: "Config") -> Iterator[str]:
    model, rank = config.model, config.lora.rank
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    outer = {"q": queries, "k": keys, "v": keys, "o": queries}  # beside embed_dim
    for target in config.lora.targets:
        least = min(model.embed_dim, outer.get(target, model.mlp_dim))
        if rank > least:
            yield f"lora.rank={rank} is more than the rank of the matrix {target}, which is at most {least}"
