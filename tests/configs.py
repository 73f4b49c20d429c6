"""Whole configurations, from which tests change single fields."""

import dataclasses

from apr_jax.config_dict import from_config_dict
from apr_jax.tasks.countdown.config import CountdownConfig
from configs import countdown4
from configs.grpo import get_config

LAPTOP = from_config_dict(get_config())
PAPER = from_config_dict(get_config("paper"))
COUNTDOWN4 = from_config_dict(countdown4.get_config())
assert isinstance(LAPTOP.task, CountdownConfig)
assert isinstance(PAPER.task, CountdownConfig)
assert isinstance(COUNTDOWN4.task, CountdownConfig)
LAPTOP_TASK, PAPER_TASK, COUNTDOWN4_TASK = LAPTOP.task, PAPER.task, COUNTDOWN4.task
TINY_MODEL = dataclasses.replace(
    LAPTOP.model,
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    mlp_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=96,
    tie_embeddings=False,
    attention="xla",
)
