"""SFT and GRPO of a pretrained model: name it with --start, a Hugging Face folder or FILE.gguf.

    python launch/train.py --config=configs/pretrained.py --start=FILE.gguf          # :laptop, SmolLM2-135M on a CPU
    python launch/train.py --config=configs/pretrained.py:gpu --start=FOLDER         # a model of some billions, one GPU

The model's shape and the tokenizer are the policy's own. Marks of spawns are text, which any vocabulary spells; with
--config.data.add_marker_tokens they become tokens, and the embedding grows by their rows. Where the tokenizer has a
chat template, prompts are a user's messages. All weights are trained; with --config.lora.rank=16, adapters are.
docs/pretrained.md has more.
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(variant: str = "laptop") -> ConfigDict:
    if variant not in ("laptop", "gpu"):
        raise ValueError(f"configs/pretrained.py:{variant}: no such variant; choose laptop or gpu")
    config = grpo.get_config()
    config.name = f"pretrained_{variant}"
    config.model.update(family="auto", max_seq_len=1_024, remat="full")
    config.data.update(tokenizer="auto", encoding="whole", chat_template="auto", directory="runs/data_pretrained")
    config.mesh.data = 1
    for section in (config.sft, config.grpo):
        section.row_len = 1_024
        section.optimizer.update(name="adamw", learning_rate=2e-5, weight_decay=0.0, warmup_steps=20)
    config.sft.update(num_steps=400, rows_per_step=8, microbatches=8, checkpoint_every=50, validate_every=50)
    config.engine.update(lanes=16, pages=16 * 64 + 1)
    config.rollout.max_steps = 1_024
    config.grpo.update(num_steps=50, prompts_per_step=8, group_size=8, rows_per_microbatch=1, length_normaliser=1_024)
    if variant == "gpu":
        config.model.compute_dtype = "bfloat16"
        config.sft.update(rows_per_step=64, num_steps=1_000)
        config.engine.update(lanes=128, pages=128 * 64 + 1)
        config.grpo.update(num_steps=200, prompts_per_step=32)
    return config
