"""A configuration small enough for a test, and packed rows to train on."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.checkpoints.phases import PhaseName
from apr_jax.config import Config
from apr_jax.config_dict import from_config_dict
from apr_jax.data.packing import pack
from apr_jax.stopping import StopSignal
from apr_jax.train.metrics import MetricsWriter
from apr_jax.train.phase import Phase
from apr_jax.train.skipping import SkippedSteps
from configs import grpo as grpo_config


def small_config(**overrides: Any) -> Config:
    """The same as a Config. Overrides by dotted name: small_config(**{"sft.num_steps": 4})."""
    config = small_config_dict("unused")
    config.update_from_flattened_dict(overrides)
    return from_config_dict(config)


def small_config_dict(directory: str) -> ConfigDict:
    """The smoke configuration, smaller yet."""
    config = grpo_config.get_config("smoke")
    config.mesh.data = 1
    config.data.update(directory=directory, num_train=24, num_validation=8, num_test=8, num_test_unseen_targets=8)
    config.data.num_workers = 1
    config.model.update(max_seq_len=128)
    config.sft.optimizer.name = "adamw"
    config.sft.row_len = config.grpo.row_len = 128
    config.model.update(num_layers=1, embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
    config.sft.update(num_steps=6, rows_per_step=4, checkpoint_every=2, validate_every=3, validation_rows=4)
    config.engine.update(lanes=8, pages=512, steps_per_visit=8, prefill_lanes=8)
    config.rollout.max_steps = 24
    config.grpo.update(num_steps=4, prompts_per_step=2, group_size=2, checkpoint_every=2, rows_per_microbatch=4)
    config.grpo.update(validate_every=2, validation_problems=4)
    config.grpo.optimizer.schedule = "constant"  # so that a step does not depend on how many follow
    config.evaluation.num_problems = 4
    return config


def on_mesh(config: Config, **mesh: int) -> Config:
    """The same on another mesh."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))


@contextlib.contextmanager
def open_phase(
    workdir: pathlib.Path, name: PhaseName, config: Config, stop: StopSignal | None = None
) -> Iterator[Phase]:
    """A phase of a run in `workdir`, that goes on after its last checkpoint."""
    with Checkpoints(workdir, name, config) as checkpoints:
        step = checkpoints.latest_step() or 0
        with MetricsWriter(workdir, name, step) as writer:
            skipped = SkippedSteps(workdir, config.faults.max_skipped_steps)
            yield Phase(checkpoints, writer, stop or StopSignal(), skipped)


def random_rows(vocab: int, row_len: int, num_sequences: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed random sequences with weights on part of the targets."""
    rng = np.random.default_rng(seed)
    sequences = []
    for length in rng.integers(5, row_len // 2, num_sequences):
        tokens = rng.integers(0, vocab, length + 1).astype(np.int32)
        weights = (rng.random(length) < 0.7) * rng.choice([1.0, 4.0], length)
        sequences.append({"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights.astype(np.float32)})
    return pack(sequences, row_len).rows
