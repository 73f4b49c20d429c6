"""One variant of the laptop setting for each way of reasoning, with its own demonstrations and its own SFT.

python launch/train.py --config=configs/methods.py:serial      # or: make train METHOD=serial
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(variant: str = "adaptive") -> ConfigDict:
    variants = {
        "adaptive": adaptive,
        "serial": serial,
        "direct": direct,
        "tree_of_thoughts": tree_of_thoughts,
        "pasta": pasta,
        "nested": nested,
        "hogwild": hogwild,
    }
    if variant not in variants:
        raise ValueError(f"configs/methods.py:{variant}: no such variant; choose one of {', '.join(variants)}")
    return variants[variant]()


def adaptive() -> ConfigDict:
    """Train Adaptive Parallel Reasoning, as configs/grpo.py:laptop does."""
    return _laptop("laptop")


def serial() -> ConfigDict:
    """Train SoS+: one thread that searches as a stream of text."""
    config = _laptop("serial")
    config.data.method = "serial"
    return config


def direct() -> ConfigDict:
    """Train answers without a search: the winning path alone."""
    config = _laptop("direct")
    config.data.method = "direct"
    return config


def tree_of_thoughts() -> ConfigDict:
    """Train Tree of Thoughts: proposers and evaluators, driven by a search.

    SFT alone: a reward for the root's answer says nothing about a single proposal or verdict.
    """
    config = _laptop("tree_of_thoughts")
    config.data.method = "tree_of_thoughts"
    config.sft.num_steps = 1_000
    config.grpo.num_steps = 0
    return config


def pasta() -> ConfigDict:
    """Train PASTA: a parent searches beside its children and reads all they wrote, in a context twice as long."""
    config = _laptop("pasta")
    config.data.method = "pasta"
    config.model.max_seq_len = config.sft.row_len = config.grpo.row_len = 1_024
    config.sft.update(num_steps=1_000, rows_per_step=4)
    config.rollout.max_steps = 1_024
    config.grpo.rows_per_microbatch = 2
    return config


def nested() -> ConfigDict:
    """Train Adaptive Parallel Reasoning whose children spawn too.

    Two levels of spawns take four numbers; these are small. Goals two levels down are rare and therefore learnt late:
    hence the heuristic, near targets and twice as many steps (docs/reasoning.md).
    """
    config = _laptop("nested")
    config.task.update(num_numbers=4, max_number=10, max_target=24, heuristic="mult", spawn_depth=2)
    config.task.update(parent_beams=(3,), child_beam_max=4, retry_probability=0.0)
    config.data.num_train = 12_000
    config.sft.num_steps = 2_400
    config.rollout.max_depth = 2
    return config


def hogwild() -> ConfigDict:
    """Train Hogwild!: two workers on one shared cache. SFT alone: GRPO takes each call as a sequence of its own."""
    config = _laptop("hogwild")
    config.data.method = "hogwild"
    config.model.max_seq_len = config.sft.row_len = config.grpo.row_len = 800  # the text of both workers
    config.sft.update(rows_per_step=6, num_steps=1_000, validation_rows=12)
    config.grpo.num_steps = 0
    return config


def _laptop(name: str) -> ConfigDict:
    config = grpo.laptop()
    config.name = name
    return config
