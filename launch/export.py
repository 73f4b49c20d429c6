"""Write a policy for other programs: a Hugging Face folder, or a GGUF file.

    python launch/export.py --checkpoint=runs/laptop --out=exported           # transformers, vLLM
    python launch/export.py --checkpoint=runs/laptop/best --out=laptop.gguf   # llama.cpp
    python launch/export.py --format=gguf --out=exported                      # the newest run, as exported.gguf
    python launch/export.py --checkpoint=FILE.gguf --out=dequantised          # and back
    python launch/export.py --checkpoint=runs/laptop --out=half --type=BF16
    python launch/export.py --checkpoint=exported --out=small.gguf --type=Q8_0
    python launch/export.py --checkpoint=runs/lora --out=adapter --adapter    # peft

The tokenizer, the configuration of the training and what a server needs to run spawns travel along
(docs/pretrained.md).
Exit codes: 0 done, 1 failed, 2 bad arguments.
"""

import pathlib
import sys

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.evaluation.rollout_sources import define_checkpoint, policy_folder

_CHECKPOINT = define_checkpoint()
_OUT = entry.define_folder("out", "Folder to write, or FILE.gguf.", ".gguf")
_FORMAT = flags.DEFINE_enum("format", None, ["hf", "gguf"], "Kind to write [gguf where --out ends in it, else hf].")
_TYPE = flags.DEFINE_string(
    "type",
    "F32",
    "Of the matrices of a GGUF file: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1. Of a folder: F32, BF16.",
)
_ADAPTER = flags.DEFINE_bool("adapter", False, "Write the LoRA adapters alone, as a folder of the package peft.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "For a policy that brings none: tokenizer.json, or builtin.")


def main() -> None:
    if not _OUT.value:
        raise ConfigError("--out: name a folder to write, or FILE.gguf")
    out = pathlib.Path(_OUT.value)
    if _FORMAT.value == "gguf" and out.suffix != ".gguf":
        out = out.with_name(f"{out.name}.gguf")
    if _FORMAT.value == "hf" and out.suffix == ".gguf":
        raise ConfigError(f"--out={out}: --format=hf writes a folder; leave the ending out")
    checkpoint = policy_folder(_CHECKPOINT.value)
    from apr_jax.evaluation.export import Exported, check_target, export, export_adapters

    check_target(out, _TYPE.value)
    if _ADAPTER.value:
        if out.suffix == ".gguf":
            raise ConfigError(f"--out={out}: adapters go to a folder")
        note = export_adapters(checkpoint, out)
    else:
        note = export(Exported.read(checkpoint, _TOKENIZER.value), out, _TYPE.value)
    if note:
        print(note, file=sys.stderr)
    print(out)


if __name__ == "__main__":
    entry.run(main)
