"""Nested sums: a second task, trained from nothing by SFT and GRPO in two minutes.

    python launch/train.py --config=configs/nested_sums.py

Of the laptop's setting (configs/grpo.py) it changes the task and sizes.
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config() -> ConfigDict:
    config = grpo.laptop()
    config.name = "nested_sums"
    config.task = dict(name="nested_sums", depth=3)
    config.model.update(num_layers=2, embed_dim=128, mlp_dim=256, num_heads=2, num_kv_heads=2, max_seq_len=64)
    config.data.update(num_train=4_000, num_validation=200, num_test=500, num_test_unseen_targets=200)
    config.sft.update(num_steps=300, rows_per_step=16, row_len=128, validate_every=100)
    config.rollout.update(max_depth=2, max_children=2, max_spawns=1, max_steps=96)
    config.engine.pages = 320
    config.grpo.update(num_steps=8, row_len=128, prompts_per_step=16, rows_per_microbatch=8, checkpoint_every=4)
    config.evaluation.num_problems = 500
    return config
