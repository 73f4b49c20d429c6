"""Writes trl_objectives.json: losses and gradients of TRL's own GRPOTrainer code for made-up log-probabilities.

    python tests/oracles/make_trl_objectives.py          # needs torch and trl; the repository's tests need neither

The trainer's `_compute_loss` runs as it stands, on a stand-in for the trainer whose forward pass returns the given
log-probabilities. TRL has one call a rollout. Its truncated importance ratio is made in a longer function, whose
`token_truncate` line is repeated here.
"""

import argparse
import collections
import json
import pathlib
import types
from importlib import metadata

import torch
from trl import GRPOTrainer

ROLLOUTS, TIME, MAX_COMPLETION, BETA = 8, 10, 16, 0.05
CASES = [
    {"name": "grpo", "loss_type": "grpo", "low": 0.2, "high": 0.2},
    {"name": "grpo_clip_higher", "loss_type": "grpo", "low": 0.2, "high": 0.28},
    {"name": "grpo_truncated", "loss_type": "grpo", "low": 0.2, "high": 0.2, "cap": 1.1},
    {"name": "bnpo", "loss_type": "bnpo", "low": 0.2, "high": 0.2},
    {"name": "dr_grpo", "loss_type": "dr_grpo", "low": 0.2, "high": 0.2},
    {"name": "dr_grpo_truncated", "loss_type": "dr_grpo", "low": 0.2, "high": 0.2, "cap": 1.1},
    {"name": "dapo", "loss_type": "dapo", "low": 0.2, "high": 0.28},
    {"name": "dapo_truncated", "loss_type": "dapo", "low": 0.2, "high": 0.28, "cap": 1.1},
    {"name": "cispo", "loss_type": "cispo", "low": 1.0, "high": 0.5},
    {"name": "cispo_truncated", "loss_type": "cispo", "low": 1.0, "high": 0.5, "cap": 1.1},
    {"name": "gspo", "loss_type": "grpo", "low": 0.03, "high": 0.04, "level": "sequence"},
    {"name": "gspo_truncated", "loss_type": "grpo", "low": 0.03, "high": 0.04, "level": "sequence", "cap": 1.1},
]


class Accelerator:
    """One process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    def gather_for_metrics(self, x):
        return x

    def reduce(self, x, reduction="sum"):
        return x


def stand_in(case, logprobs):
    """What `_compute_loss` reads of its trainer."""
    args = types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = types.SimpleNamespace(
        args=args,
        model=types.SimpleNamespace(training=True),
        accelerator=Accelerator(),
        beta=BETA,
        loss_type=case["loss_type"],
        importance_sampling_level=case.get("level", "token"),
        epsilon_low=case["low"],
        epsilon_high=1 + case["high"] if case["loss_type"] == "cispo" else case["high"],  # CISPO's is a bound
        max_completion_length=MAX_COMPLETION,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm="cap" in case,
        vllm_importance_sampling_correction="cap" in case,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)
    return trainer


def run(case, data):
    logprobs = data["logprobs"].clone().requires_grad_()
    mask = data["mask"]
    inputs = {
        "prompt_ids": torch.zeros((ROLLOUTS, 1), dtype=torch.long),
        "prompt_mask": torch.ones((ROLLOUTS, 1), dtype=torch.long),
        "completion_ids": torch.zeros((ROLLOUTS, TIME), dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": data["advantages"],
        "old_per_token_logps": data["old_logprobs"],
        "ref_per_token_logps": data["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    if "cap" in case:
        gap = (data["old_logprobs"] - data["rollout_logprobs"]) * mask
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(gap), min=None, max=case["cap"])
    trainer = stand_in(case, logprobs)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (grad,) = torch.autograd.grad(loss, logprobs)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    clipped = logged.get("clip_ratio/region_mean")
    expected = {"loss": loss.item(), "grad_logprobs": grad.tolist(), "kl": logged["kl"]}
    # TRL's share for sequences is of sequences, and CISPO's of positive advantages only: other figures than ours.
    if clipped is not None and "level" not in case:
        expected["clip_fraction"] = clipped
    return case | {"expected": expected}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("trl_objectives.json"))
    out = parser.parse_args().out
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([10, 3, 1, 7, 5, 10, 8, 2])
    mask = (torch.arange(TIME)[None] < lengths[:, None]).float()
    logprobs = -torch.rand((ROLLOUTS, TIME), generator=generator) * 3 - 0.05

    def near(scale):
        return (logprobs + scale * torch.randn((ROLLOUTS, TIME), generator=generator)).clamp(max=-1e-3)

    data = {
        "logprobs": logprobs,
        "old_logprobs": near(0.3),
        "ref_logprobs": near(0.5),
        "rollout_logprobs": near(0.3),
        "mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.8, -1.2, 0.9, 0.3, 0.0]),
    }
    cases = [run(case, data) for case in CASES]
    source = {
        "source": "trl.GRPOTrainer._compute_loss (https://github.com/huggingface/trl, Apache-2.0)",
        "versions": {name: metadata.version(name) for name in ("trl", "torch")},
        "made_by": "tests/oracles/make_trl_objectives.py",
        "max_completion_length": MAX_COMPLETION,
        "beta": BETA,
    }
    document = source | {name: value.tolist() for name, value in data.items()} | {"cases": cases}
    out.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
