"""Writes families.npz: what transformers computes for each folder of `made_families.py`.

    python tests/oracles/make_families.py          # needs torch and transformers; the repository's tests need neither

For each case: float32 logits `[2, 96, vocabulary]` at every eighth position, the mean next-token loss, its gradient for
one tensor of each kind, and 16 greedy tokens after the first 40.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.oracles.made_families import CASES, tokens, write_folder

GRADIENTS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.1.mlp.down_proj.weight",
)


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    ids = torch.from_numpy(tokens())
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = write_folder(pathlib.Path(folder) / case, case)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert model.config.model_type == CASES[case]["model_type"]
        out = model(ids, labels=ids)
        out.loss.backward()
        arrays[f"{case}/logits"] = out.logits.detach().numpy()[:, ::8]
        arrays[f"{case}/loss"] = out.loss.detach().numpy()
        parameters = dict(model.named_parameters())
        for name in GRADIENTS:
            if name in parameters:
                arrays[f"{case}/gradient/{name}"] = parameters[name].grad.numpy()
        prompt = {"input_ids": ids[:1, :40], "attention_mask": torch.ones_like(ids[:1, :40])}
        greedy = model.generate(**prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)
        arrays[f"{case}/greedy"] = greedy.numpy()[0, 40:]
    np.savez_compressed(pathlib.Path(__file__).with_name("families.npz"), **arrays)


if __name__ == "__main__":
    main()
