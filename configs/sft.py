"""Supervised fine-tuning alone: configs/grpo.py without its second phase.

python launch/train.py --config=configs/sft.py
python launch/train.py --config=configs/sft.py:paper
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(variant: str = "laptop") -> ConfigDict:
    config: ConfigDict = runpy.run_path(str(pathlib.Path(__file__).with_name("grpo.py")))["get_config"](variant)
    config.name = f"sft_{variant}"
    config.grpo.num_steps = 0
    return config
