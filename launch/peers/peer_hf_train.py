"""Supervised fine-tuning by Hugging Face transformers: packed rows, SDPA attention, AdamW.

The batches are ours: the same packed rows, loss weights and positions, and attention masked to the earlier tokens of a
token's own segment. A step is forward, weighted cross-entropy, backward, clipping and AdamW (torch's fused one). Two
modes are measured, and the faster one is compared:
    eager     without compilation
    compile   forward and loss through torch.compile (inductor), which compiles the backward pass too
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import train_protocol
import transformers

METHOD = "a step is forward, loss, backward, clipping and fused AdamW on our rows; masks are made before"


def modes(workload: train_protocol.Workload) -> dict[str, Callable[[], train_protocol.Pass]]:
    torch.set_num_threads(workload["threads"])
    batches = [
        {name: value.to(_device(workload)) for name, value in _batch(rows).items()} for rows in workload["batches"]
    ]
    return {
        "eager": lambda: _trainer(workload, batches, compiled=False),
        "compile": lambda: _trainer(workload, batches, compiled=True),
    }


def _device(workload: train_protocol.Workload) -> str:
    return "cuda" if workload["device"] == "gpu" else "cpu"


def _batch(rows: dict[str, list[list[Any]]]) -> dict[str, torch.Tensor]:
    ids_BT = torch.tensor(rows["segment_ids"])
    T = ids_BT.shape[1]
    visible_BTT = (ids_BT[:, :, None] == ids_BT[:, None, :]) & torch.tril(torch.ones(T, T, dtype=torch.bool))
    return {
        "input_ids": torch.tensor(rows["tokens"]),
        "position_ids": torch.tensor(rows["positions"]),
        "attention_mask": torch.where(visible_BTT, 0.0, torch.finfo(torch.float32).min)[:, None],
        "targets": torch.tensor(rows["targets"]),
        "weights": torch.tensor(rows["weights"], dtype=torch.float32),
    }


def _trainer(
    workload: train_protocol.Workload, batches: list[dict[str, torch.Tensor]], compiled: bool
) -> train_protocol.Pass:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        workload["model"], dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).train()
    model = model.to(_device(workload))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = workload["optimizer"]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]

    def loss_fn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits_BTV = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).logits
        nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        return (nll * batch["weights"].flatten()).sum()

    forward = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn

    def run() -> tuple[list[float], list[float]]:
        with torch.no_grad():
            model.load_state_dict(start)
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings["weight_decay"]},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings["learning_rate"],
            betas=(settings["b1"], settings["b2"]),
            fused=True,
        )
        seconds, losses = [], []
        for batch in batches:
            began = time.perf_counter()
            loss = forward(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - began)
        return seconds, losses

    return run


if __name__ == "__main__":
    train_protocol.main(f"transformers {transformers.__version__}, torch {torch.__version__}", METHOD, modes)
