"""The paper's problems on two CPU cores: four numbers of 1..99, targets 10..100, context 2,048 of the built-in tokens.

    python launch/train.py --config=configs/countdown4.py:facts            # first arithmetic: two million tokens
    python launch/train.py --config=configs/countdown4.py --start=runs/countdown4_facts  # then SFT, and evaluation
    python launch/train.py --config=configs/countdown4.py:quick            # minutes: does everything run?

The facts come first: if they are only mixed in, they are learnt after the search. They stay in every batch afterwards,
so that they are not forgotten.

Beams and spawns are the reference's. Departures from it:
operations come in the order in which they are generated (`task.shuffle=False`);
operations with a result above 255 are left out (`task.max_result`), so that every number is one token;
30 % of all training tokens are bare arithmetic (`data.facts_share`);
number embeddings start as waves (`sft.number_waves`, in `:facts`);
only generated tokens have loss, and the replay of the winning path counts twice.
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(variant: str = "adaptive") -> ConfigDict:
    variants = {"adaptive": adaptive, "facts": facts, "quick": quick}
    if variant not in variants:
        raise ValueError(f"configs/countdown4.py:{variant}: no such variant; choose one of {', '.join(variants)}")
    return variants[variant]()


def adaptive() -> ConfigDict:
    """Configure a 3.3M-parameter Llama from nothing. Its schedule can be extended until it falls."""
    config = grpo.get_config("laptop")
    config.name = "countdown4"
    config.model.update(num_layers=4, embed_dim=256, mlp_dim=688, num_heads=4, num_kv_heads=4, max_seq_len=2_048)
    config.model.tie_embeddings = False
    config.task.update(
        num_numbers=4,
        max_number=99,
        max_target=100,
        parent_beams=tuple(range(1, 11)),
        child_beam_max=15,
        spawn_probability=0.9,
        retry_probability=0.0,
        heuristic="mult",
        max_result=255,
    )
    config.task.num_unseen_targets = 9
    config.data.update(num_train=20_000, num_validation=1_000, num_test=10_000, num_test_unseen_targets=1_000)
    config.data.update(replay_weight=2.0, facts_share=0.3)
    config.sft.update(num_steps=40_000, rows_per_step=2, row_len=2_048)
    config.sft.update(checkpoint_every=50, validate_every=500, validation_rows=16)
    config.sft.optimizer.update(schedule="trapezoid", learning_rate=1e-3, warmup_steps=100, decay_steps=4_000)
    config.engine.update(lanes=16, pages=2_560, prefill_lanes=8)
    config.rollout.update(max_steps=2_048, max_spawns=4, max_total_tokens=65_536)
    config.grpo.update(num_steps=0, row_len=2_048)
    config.faults.keep_checkpoints = 3
    config.evaluation.update(num_problems=256, also_temperature=1.0)
    return config


def facts() -> ConfigDict:
    """Configure the same model on bare arithmetic, with a twentieth of demonstrations: the start of `adaptive`."""
    config = adaptive()
    config.name = "countdown4_facts"
    config.model.max_seq_len = 1_024
    config.data.update(num_train=500, num_validation=32, num_test=16, num_test_unseen_targets=16, facts_share=0.95)
    config.sft.update(num_steps=1_000, row_len=1_024, number_waves=0.5, checkpoint_every=100, validate_every=600)
    config.sft.update(validation_rows=4)
    config.sft.optimizer.update(schedule="constant", warmup_steps=50)
    config.engine.update(lanes=2, pages=256, prefill_lanes=2)
    config.rollout.max_steps = 16
    config.grpo.update(row_len=1_024, validation_problems=16)
    config.evaluation.num_problems = 1
    return config


def quick() -> ConfigDict:
    """Run everything once, in minutes. Learns nothing."""
    config = adaptive()
    config.name = "countdown4_quick"
    config.model.update(num_layers=2, embed_dim=128, mlp_dim=256, num_heads=2, num_kv_heads=2)
    config.data.update(num_train=256, num_validation=32, num_test=32, num_test_unseen_targets=16)
    config.sft.update(num_steps=4, rows_per_step=2, checkpoint_every=2, validate_every=2, validation_rows=2)
    config.sft.optimizer.update(warmup_steps=1, decay_steps=1)
    config.rollout.update(max_steps=64)
    config.grpo.validation_problems = 16
    config.evaluation.num_problems = 8
    return config
