"""Training speed: the models and trainers of configs/grpo.py, a GRPO step of 64 rollouts.

python launch/benchmark_train.py --config=configs/benchmark_train.py          # :laptop
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(variant: str = "laptop") -> ConfigDict:
    config = grpo.get_config(variant)
    config.name = f"benchmark_train_{variant}"
    if config.engine.lanes == -1:
        config.engine.update(lanes=64, pages=1_024)  # the trainer's memory is in no plan here
    config.grpo.update(prompts_per_step=8, group_size=8, inner_updates=1, kl_coef=0.0)
    return config
