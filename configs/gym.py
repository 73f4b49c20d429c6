"""GRPO of a pretrained model on a dataset of reasoning-gym, which its own scorer judges (docs/tasks.md).

    python launch/train.py --config=configs/gym.py:products --start=FOLDER
    python launch/train.py --config=configs/gym.py:countdown --start=FILE.gguf \\
        --config.task.settings='{"max_numbers": 4}'
    python launch/train.py --config=configs/gym.py:countdown --start=FOLDER --config.task.traces=FILE.jsonl \\
        --config.sft.num_steps=200

Of the setting of a pretrained model (configs/pretrained.py) it changes the task, and leaves out SFT.
"""

from ml_collections import ConfigDict

from configs import pretrained


def get_config(variant: str = "countdown") -> ConfigDict:
    config = pretrained.any_task()
    config.name = f"gym_{variant}"
    config.task = dict(name="gym", dataset=variant, settings="", dataset_seed=0, size=100_000, traces="")
    config.data.update(num_train=4_000, num_validation=100, num_test=500, num_test_unseen_targets=100)
    config.sft.num_steps = 0
    config.evaluation.num_problems = 500
    return config
