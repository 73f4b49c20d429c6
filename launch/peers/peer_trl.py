"""A GRPO step of TRL's GRPOTrainer on torch's CPU backend, rollouts included.

A step is transformers' `generate` for all rollouts at once, a reward function that alternates 0 and 1, one forward and
backward pass over the padded batch, and AdamW (torch's fused one). Prompts are left-padded, EOS is forced at each
rollout's own length, and the batch goes on until the longest has ended. With beta 0 there is no reference policy, and
with one iteration no pass for the old log-probabilities; TRL's loss is "grpo". Gradient checkpointing and half
precision, on by default, are off. Three modes are measured, and the fastest is compared:
    whole     a generated batch is one batch of the update
    split     the update goes over it in four microbatches, with less padding held at a time
    static    as whole, decoding with a static cache
Prompts are text with one word a token, "t12 t7 t301".
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import tokenizers
import torch
import train_protocol
import transformers
import trl

METHOD = (
    "a step is TRL's own from on_step_begin to on_step_end: generation, rewards, forward, backward, clipping, AdamW"
)
STEPS = 1  # of a pass


class ForcedEnds(transformers.LogitsProcessor):
    """A logits processor that forbids EOS until a rollout has its length, and then allows nothing else."""

    def __init__(self, lengths: list[int], prompt: int, eos: int) -> None:
        self._lengths, self._prompt, self._eos = torch.tensor(lengths), prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        last = self._lengths <= input_ids.shape[1] - self._prompt + 1
        only_eos = torch.full_like(scores, -torch.inf)
        only_eos[:, self._eos] = 0.0
        scores[:, self._eos] = -torch.inf
        return torch.where(last[:, None], only_eos, scores)


class Times(transformers.TrainerCallback):
    """The begin and end of each step."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended.append(time.perf_counter())


def modes(workload: train_protocol.Workload) -> dict[str, Callable[[], train_protocol.Pass]]:
    torch.set_num_threads(workload["threads"])
    return {
        "whole": lambda: _trainer(workload, microbatches=1, cache=None),
        "split": lambda: _trainer(workload, microbatches=4, cache=None),
        "static": lambda: _trainer(workload, microbatches=1, cache="static"),
    }


def _trainer(workload: train_protocol.Workload, microbatches: int, cache: str | None) -> train_protocol.Pass:
    lengths, settings = workload["lengths"], workload["optimizer"]
    tokenizer = _word_tokenizer(workload["vocab_size"], workload["pad_id"], workload["eos_id"])
    prompts = [" ".join(f"t{token}" for token in prompt) for prompt in workload["prompts"]]
    longest_prompt = max(map(len, workload["prompts"]))
    folder = tempfile.mkdtemp(prefix="trl-")

    def run() -> tuple[list[float], list[float]]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            workload["model"], dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        model.generation_config.eos_token_id = workload["eos_id"]
        model.generation_config.pad_token_id = workload["pad_id"]
        generate, ends = model.generate, ForcedEnds(lengths, longest_prompt, workload["eos_id"])
        model.generate = lambda *args, **kwargs: generate(
            *args, **kwargs, logits_processor=transformers.LogitsProcessorList([ends])
        )
        generated: list[int] = []

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            generated.extend(map(len, completion_ids))
            return [float(index % 2) for index in range(len(completion_ids))]

        times = Times()
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(lengths) // microbatches,
                gradient_accumulation_steps=microbatches,
                num_generations=workload["group_size"],
                max_completion_length=max(lengths),
                max_steps=STEPS,
                learning_rate=settings["learning_rate"],
                adam_beta1=settings["b1"],
                adam_beta2=settings["b2"],
                weight_decay=settings["weight_decay"],
                max_grad_norm=settings["clip_norm"],
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                loss_type="grpo",
                beta=0.0,
                temperature=1.0,
                shuffle_dataset=False,
                pad_to_multiple_of=None,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=workload["device"] == "cpu",
                cache_implementation=cache,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[times],
        )
        trainer.train()
        if generated[: len(lengths)] != lengths:
            raise RuntimeError(f"rollouts of {generated[:8]}.. tokens instead of {lengths[:8]}..")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return [end - begin for begin, end in zip(times.began, times.ended, strict=True)], losses

    return run


def _word_tokenizer(vocab_size: int, pad_id: int, eos_id: int) -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer that reads one word a token: "t12" is token 12."""
    words = {pad_id: "<pad>", eos_id: "<eos>"}
    vocabulary = {words.get(index, f"t{index}"): index for index in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


if __name__ == "__main__":
    version = f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    train_protocol.main(version, METHOD, modes)
