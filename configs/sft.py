"""Supervised fine-tuning alone: configs/grpo.py without its second phase.

python launch/train.py --config=configs/sft.py
python launch/train.py --config=configs/sft.py:paper
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(variant: str = "laptop") -> ConfigDict:
    config = grpo.get_config(variant)
    config.name = f"sft_{variant}"
    config.grpo.num_steps = 0
    return config
