"""The task settings that the tests of this folder share."""

from apr_jax.config import DataConfig, TaskConfig

LAPTOP = TaskConfig(
    num_numbers=3,
    min_number=1,
    max_number=20,
    min_target=10,
    max_target=40,
    serial_beam_min=1,
    serial_beam_max=5,
    serial_dfs_probability=0.5,
    parent_beams=tuple(range(4, 11)),
    child_beam_max=15,
    spawn_probability=1.0,
    spawn_depth=1,
    context_windows=(),
    retry_probability=0.0,
    heuristic="mult",
    shuffle=False,
)
REFERENCE = TaskConfig(
    num_numbers=4,
    min_number=1,
    max_number=99,
    min_target=10,
    max_target=100,
    serial_beam_min=1,
    serial_beam_max=5,
    serial_dfs_probability=0.5,
    parent_beams=tuple(range(1, 11)),
    child_beam_max=15,
    spawn_probability=0.9,
    spawn_depth=1,
    context_windows=(),
    retry_probability=0.0,
    heuristic="mult",
    shuffle=True,
)
SMALL_DATA = DataConfig(
    directory="unused",
    method="adaptive",
    tokenizer="builtin",
    num_train=200,
    num_validation=40,
    num_test=60,
    num_test_unseen_targets=30,
    num_unseen_targets=5,
    num_workers=1,
    condition_on_budget=True,
    replay_weight=1.0,
    loss_on_context=False,
)
