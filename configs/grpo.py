"""Supervised warm start, then GRPO.

    python launch/train.py --config=configs/grpo.py            # :laptop, two CPU cores, under half an hour
    python launch/train.py --config=configs/grpo.py:smoke      # under a minute: does everything run?
    python launch/train.py --config=configs/grpo.py:paper      # the 228M model, the paper's numbers
    python launch/train.py --config=configs/grpo.py:paper_gqa  # the same with four key/value heads
    python launch/train.py --config=configs/grpo.py:7b         # Llama-2 7B on eight H100s (docs/scale.md)
    python launch/train.py --config=configs/grpo.py --config.grpo.num_steps=40 --config.seed=1

apr_jax/config.py documents every field, docs/recipe.md the source of every number.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "laptop") -> ConfigDict:
    variants = {"laptop": laptop, "smoke": smoke, "paper": paper, "paper_gqa": paper_gqa, "7b": llama_7b}
    if variant not in variants:
        raise ValueError(f"configs/grpo.py:{variant}: no such variant; choose one of {', '.join(variants)}")
    return variants[variant]()


def laptop() -> ConfigDict:
    """Train a 1.4M-parameter Llama on three numbers up to 20, from nothing and on two cores."""
    config = ConfigDict()
    config.name = "laptop"
    config.seed = 0
    config.model = dict(
        family="llama",
        vocab_size=336,
        num_layers=3,
        embed_dim=192,
        mlp_dim=512,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        max_seq_len=512,
        rope_theta=10_000.0,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        tie_embeddings=True,
        compute_dtype="float32",
        attention="auto",
        remat="none",
    )
    config.task = dict(
        name="countdown",
        num_numbers=3,
        min_number=1,
        max_number=20,
        min_target=10,
        max_target=40,
        num_unseen_targets=3,
        serial_beam_min=1,
        serial_beam_max=5,
        serial_dfs_probability=0.5,
        parent_beams=(4,),
        child_beam_max=8,
        spawn_probability=1.0,
        spawn_depth=1,
        context_windows=(),
        retry_probability=0.4,
        heuristic="none",
        search_order="breadth_first",
        restate=False,
        restate_operation=False,
        attempts=False,
        parent_replay="root",
        cancel_on_success=False,
        shuffle=False,
        max_result=0,
    )
    config.data = dict(
        directory="runs/data",
        method="adaptive",
        tokenizer="builtin",
        add_marker_tokens=False,
        encoding="lines",
        bos="auto",
        chat_template="none",
        num_train=10_000,
        num_validation=300,
        num_test=1_000,
        num_test_unseen_targets=300,
        num_workers=2,
        condition_on_budget=False,
        replay_weight=4.0,
        children_share=1.0,
        loss_on_context=False,
        facts_share=0.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # all devices; a CPU has two
    config.lora = dict(rank=0, alpha=16.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
    config.sft = dict(
        num_steps=1_200,
        rows_per_step=8,
        row_len=512,
        microbatches=1,
        number_waves=0.0,
        optimizer=dict(
            name="muon",
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            schedule="cosine",
            warmup_steps=50,
            initial_scale=0.0,
            final_scale=0.02,
            decay_steps=0,
            b1=0.9,
            b2=0.95,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        checkpoint_every=100,
        validate_every=100,
        validation_rows=16,
    )
    config.engine = dict(
        lanes=32,
        pages=1_280,
        page_size=16,
        steps_per_visit=16,
        prefill_lanes=8,
        decode_attention="auto",
        page_dtype="compute",
        prefix_reuse=True,
    )
    config.rollout = dict(
        max_steps=512,
        context_window=0,
        max_children=16,
        max_spawns=4,
        max_depth=1,
        max_total_children=256,
        max_total_tokens=262_144,
        budget=0,
        temperature=0.5,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        cancel_on_success=False,
        constrain_spawns=False,
    )
    config.tree_of_thoughts = dict(search="breadth_first", breadth=5, value_samples=1, threshold=0.5)
    config.grpo = dict(
        objective="grpo",  # or dr_grpo, dapo, gspo, cispo: docs/objectives.md has the settings of each
        num_steps=12,
        prompts_per_step=32,
        group_size=8,
        overlap=0,  # off CPUs 1 fills the lanes of a batch's tail: docs/objectives.md
        max_resamples=0,
        inner_updates=1,
        clip_ratio=0.2,
        clip_ratio_high=0.2,
        kl_coef=0.0,
        advantage_eps=1e-6,
        length_normaliser=512,  # read by dr_grpo
        importance_cap=0.0,
        credit="rollout",
        reward=dict(
            sequential_token_price=0.0,
            token_price=0.0,
            thread_price=0.0,
            failures_pay=False,
        ),
        row_len=512,
        rows_per_microbatch=4,
        optimizer=dict(
            name="adamw",
            learning_rate=4.5e-5,
            muon_learning_rate=0.0,
            schedule="cosine",
            warmup_steps=0,
            initial_scale=1.0,
            final_scale=0.1,
            decay_steps=0,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        checkpoint_every=2,
        validate_every=0,
        validation_problems=100,
    )
    config.faults = dict(keep_checkpoints=2, max_skipped_steps=3)
    config.evaluation = dict(split="test", num_problems=1_000, temperature=0.0, also_temperature=1.0)
    return config


def smoke() -> ConfigDict:
    """Run every stage once, in under a minute. The policy learns nothing."""
    config = laptop()
    config.name = "smoke"
    config.model.update(num_layers=2, embed_dim=64, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=32)
    config.data.update(num_train=64, num_validation=16, num_test=16, num_test_unseen_targets=16)
    config.sft.update(num_steps=20, checkpoint_every=10, validate_every=10, validation_rows=4)
    config.sft.optimizer.warmup_steps = 2
    config.engine.update(lanes=8, pages=256)
    config.rollout.max_steps = 96
    config.grpo.update(
        num_steps=2, prompts_per_step=4, group_size=4, inner_updates=2, kl_coef=0.001, checkpoint_every=1
    )
    config.grpo.update(validate_every=1, validation_problems=8)
    config.evaluation.num_problems = 16
    return config


def paper() -> ConfigDict:
    """Follow the paper's model and schedules (arXiv 2504.15466, section 4 and appendix; RL: its released code)."""
    config = laptop()
    config.name = "paper"
    config.model.update(
        vocab_size=32_000,
        num_layers=18,
        embed_dim=1_024,
        mlp_dim=2_752,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_seq_len=4_096,
        tie_embeddings=False,
        compute_dtype="bfloat16",
        remat="auto",
    )
    config.task.update(
        num_numbers=4,
        max_number=99,
        max_target=100,
        num_unseen_targets=9,
        parent_beams=tuple(range(1, 11)),
        child_beam_max=15,
        spawn_probability=0.9,
        retry_probability=0.0,
        heuristic="mult",
        shuffle=True,
    )
    config.data.update(
        num_train=500_000,
        num_validation=1_000,
        num_test_unseen_targets=1_000,
        condition_on_budget=True,
        replay_weight=1.0,
        loss_on_context=True,
    )
    config.sft.update(
        num_steps=19_000, rows_per_step=256, row_len=4_096, microbatches=64, checkpoint_every=500, validate_every=500
    )
    config.sft.optimizer.update(
        name="adamw", learning_rate=5e-5, warmup_steps=190, initial_scale=0.1, final_scale=0.01, b2=0.999
    )
    config.engine.update(lanes=-1, pages=-1, page_size=64, steps_per_visit=64, prefill_lanes=16)
    config.rollout.update(max_steps=4_096, max_total_tokens=1_048_576, temperature=1.0)
    config.grpo.update(
        num_steps=150,
        prompts_per_step=64,
        group_size=5,
        inner_updates=2,
        kl_coef=0.001,
        row_len=4_096,
        rows_per_microbatch=4,
        checkpoint_every=10,
        validate_every=10,
        validation_problems=300,
    )
    config.grpo.optimizer.update(learning_rate=1e-5, schedule="constant", b2=0.999, weight_decay=0.01)
    return config


def paper_gqa() -> ConfigDict:
    """Group the heads of `paper` by four (Ainslie et al. 2023), so that a decode step reads a quarter of the caches."""
    config = paper()
    config.name = "paper_gqa"
    config.model.num_kv_heads = 4
    return config


def llama_7b() -> ConfigDict:
    """Train Llama-2 7B (Touvron et al. 2023, table 1; MLP width of its released weights) on one machine of 8 H100s.

    Schedules are those of `paper`. docs/scale.md gives the split and what each device then holds.
    """
    config = paper()
    config.name = "7b"
    config.model.update(
        num_layers=32, embed_dim=4_096, mlp_dim=11_008, num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-5
    )
    config.mesh.fsdp = 8
    config.sft.update(microbatches=32, validation_rows=16)
    config.engine.prefill_lanes = 4
    config.grpo.rows_per_microbatch = 8
    return config
