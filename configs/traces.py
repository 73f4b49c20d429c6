"""SFT and GRPO of a pretrained model on prompts, calls and answers of one's own, a JSON object a line (docs/tasks.md).

    python launch/train.py --config=configs/traces.py:FILE.jsonl --start=FOLDER

The held-out splits come from the same file: a hundred problems in all, which train is then not drawn from.
"""

from ml_collections import ConfigDict

from configs import pretrained


def get_config(variant: str = "") -> ConfigDict:
    config = pretrained.any_task()
    config.name = "traces"
    config.task = dict(name="traces", traces=variant)
    config.data.update(num_train=4_000, num_validation=20, num_test=60, num_test_unseen_targets=20)
    config.grpo.validation_problems = 20
    config.evaluation.num_problems = 60
    return config
