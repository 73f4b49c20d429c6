"""The authors' released checkpoints (huggingface.co/Parallel-Reasoning), decoded and scored as their code does it.

    python launch/evaluate.py --checkpoint=FOLDER --config=configs/reference.py:apr_cond10 --problems=val.json
    python launch/train.py --config=configs/reference.py:apr --config.task.traces=train_apr.json

A variant is named as their checkpoints are, `_grpo` or not: apr, apr_condN (N children named in the prompt), sosp and
sosp_condN (N tokens, a multiple of 512 up to 4096); sos is sosp. FOLDER is theirs, with config.json, tokenizer.json
and weights as .safetensors. docs/reference.md says what is read how, and which figures of the paper to expect.
"""

import re

from ml_collections import ConfigDict

from configs import grpo

_VARIANT = re.compile(r"(apr|sosp?)(?:_cond([1-9][0-9]{0,5}))?(?:_grpo)?")


def get_config(variant: str = "apr") -> ConfigDict:
    match = _VARIANT.fullmatch(variant.removeprefix("llama-"))
    budget = int(match[2] or 0) if match else 0
    if match is None or (match[1] != "apr" and (budget % 512 or budget > 4_096)):
        raise ValueError(
            f"configs/reference.py:{variant}: no such variant; name a checkpoint, as apr, apr_cond10, apr_cond10_grpo, "
            "sosp or sosp_cond4096"
        )
    config = _base(budget)
    config.name = variant
    if match[1] != "apr":
        config.task.name = "reference_sosp"
        config.data.method = "serial"
        config.grpo.kl_coef = 0.01
        config.rollout.top_k = 50  # as their evaluation of SoS+ samples
    return config


def _base(budget: int) -> ConfigDict:
    """Return the setting of APR: the paper's sizes and schedules, and no limits but the context of 4,096 tokens."""
    config = grpo.paper()
    config.task.update(name="reference_apr", traces="")
    config.data.update(condition_on_budget=budget > 0, tokenizer="tokenizer.json", encoding="whole", bos="twice")
    config.rollout.update(budget=budget, max_children=4_096, max_spawns=4_096, max_total_children=65_536)
    config.rollout.update(max_steps=65_536, max_total_tokens=16_777_216)
    config.evaluation.update(temperature=0.0, num_problems=1_000)
    return config
