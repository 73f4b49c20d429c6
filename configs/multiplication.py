"""Products of 5 to 8 integers of 0..1,000 (ThreadWeaver, arXiv 2512.07843), learnt from nothing on two cores.

    python launch/train.py --config=configs/multiplication.py           # adaptive: halves, then rows, in threads
    python launch/train.py --config=configs/multiplication.py:serial    # one long multiplication after the other
    python launch/train.py --config=configs/multiplication.py:adaptive.rl --checkpoint=runs/multiplication  # then GRPO
    python launch/solve.py 742 103 15 0 1000 --checkpoint=runs/multiplication

A variant is a name, and words after it, with dots between:

    adaptive, serial    a way of reasoning
    .rl                 GRPO of it with a price on the longest chain of tokens, to be started from its SFT
    .quick              a minute: does everything run? Learns nothing

docs/tasks.md has the steps that are written, and what was measured.
"""

from ml_collections import ConfigDict

from apr_jax.tasks.multiplication.vocabulary import TOKENIZER
from configs import grpo


def get_config(variant: str = "adaptive") -> ConfigDict:
    name, *words = variant.split(".")
    names, changes = {"adaptive": adaptive, "serial": serial}, {"rl": rl, "quick": quick}
    if name not in names or not set(words) <= set(changes):
        raise ValueError(
            f"configs/multiplication.py:{variant}: no such variant; choose one of {', '.join(names)}, and after it "
            f"with dots any of {', '.join(changes)}"
        )
    config = names[name]()
    for word in words:
        changes[word](config)
    return config


def adaptive() -> ConfigDict:
    """Configure SFT of a 1.0M-parameter Llama whose threads are short: none holds more than 212 tokens."""
    config = grpo.get_config("laptop")
    config.name = "multiplication"
    config.task = dict(name="multiplication", min_factors=5, max_factors=8, round_share=0.05)
    config.model.update(num_layers=3, embed_dim=160, mlp_dim=384, num_heads=2, num_kv_heads=2)
    config.model.update(vocab_size=592, max_seq_len=256, tie_embeddings=False)
    config.data.update(tokenizer=str(TOKENIZER), replay_weight=1.0, facts_share=0.3)
    config.data.update(num_train=10_000, num_validation=1_000, num_test=1_000, num_test_unseen_targets=100)
    config.sft.update(num_steps=8_000, rows_per_step=4, row_len=512, number_waves=0.5)
    config.sft.update(checkpoint_every=100, validate_every=200)
    config.sft.optimizer.update(schedule="trapezoid", warmup_steps=50, decay_steps=2_000, final_scale=0.01)
    config.engine.update(lanes=16, pages=2_048, steps_per_visit=8)
    config.rollout.update(max_steps=256, max_depth=3, max_children=4, max_spawns=2, temperature=1.0)
    config.rollout.update(max_total_children=256, max_total_tokens=8_192)
    config.grpo.update(num_steps=0, row_len=512)
    config.evaluation.num_problems = 1_000
    return config


def serial() -> ConfigDict:
    """Configure SFT of the same model on one thread, of up to 1,060 tokens."""
    config = adaptive()
    config.name = "multiplication_serial"
    config.data.update(method="serial", facts_share=0.0)  # bare sums are written as adaptive's threads write them
    config.model.max_seq_len = 1_088
    config.sft.update(rows_per_step=2, row_len=1_088)
    config.rollout.max_steps = 1_088
    config.grpo.update(row_len=1_088, rows_per_microbatch=2)
    return config


def rl(config: ConfigDict) -> None:
    """Add GRPO with a price on the longest chain of tokens: 100 of them cost a hundredth of an answer."""
    config.name += "_rl"
    config.grpo.update(num_steps=20, prompts_per_step=16, group_size=8, checkpoint_every=2)
    config.grpo.update(validate_every=5, validation_problems=200)
    config.grpo.reward.sequential_token_price = 1e-4


def quick(config: ConfigDict) -> None:
    """Make everything small."""
    config.name += "_quick"
    config.model.update(num_layers=1, embed_dim=80, mlp_dim=128, num_heads=1, num_kv_heads=1)
    config.data.update(num_train=64, num_validation=16, num_test=16, num_test_unseen_targets=16)
    config.sft.update(num_steps=4, rows_per_step=2, checkpoint_every=2, validate_every=2, validation_rows=2)
    config.sft.optimizer.update(warmup_steps=1, decay_steps=1)
    config.rollout.max_steps = 64
    config.grpo.update(num_steps=2 * (config.grpo.num_steps > 0), prompts_per_step=2, group_size=2)
    config.grpo.update(validate_every=2, validation_problems=4, checkpoint_every=2)
    config.evaluation.num_problems = 8
