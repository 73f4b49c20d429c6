"""The task settings that the tests of this folder share."""

import dataclasses

from tests import configs

LAPTOP = dataclasses.replace(
    configs.LAPTOP_TASK,
    num_unseen_targets=5,
    parent_beams=tuple(range(4, 11)),
    child_beam_max=15,
    retry_probability=0.0,
    heuristic="mult",
)
REFERENCE = configs.PAPER_TASK
DEPTH_FIRST = configs.COUNTDOWN4_TASK
SMALL_DATA = dataclasses.replace(
    configs.LAPTOP.data,
    directory="unused",
    num_train=200,
    num_validation=40,
    num_test=60,
    num_test_unseen_targets=30,
    num_workers=1,
    condition_on_budget=True,
    replay_weight=1.0,
)
