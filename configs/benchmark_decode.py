"""Decode throughput: the models and engines of configs/grpo.py, measured with random weights.

python launch/benchmark_decode.py --config=configs/benchmark_decode.py          # :laptop
python launch/benchmark_decode.py --config=configs/benchmark_decode.py:paper    # the 228M model, context 4,096

The small model is trained and measured in float32, the large one in bfloat16; --config.model.compute_dtype= asks for
the other. The settings are for a CPU of two cores: the small model's lanes are split over both, the large one's
products share them. For an accelerator add --config.mesh.data=1.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(variant: str = "laptop") -> ConfigDict:
    config: ConfigDict = runpy.run_path(str(pathlib.Path(__file__).with_name("grpo.py")))["get_config"](variant)
    config.name = f"benchmark_decode_{variant}"
    config.rollout.max_steps = config.model.max_seq_len
    if variant == "laptop":
        # Shorter visits than in training: fewer lanes idle, and the host still keeps up (docs/decode.md).
        config.rollout.update(steps_per_visit=10)
    return config
