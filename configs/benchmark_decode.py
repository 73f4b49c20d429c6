"""Decode throughput: the models and engines of configs/grpo.py, measured with random weights.

    python launch/benchmark_decode.py --config=configs/benchmark_decode.py          # :laptop
    python launch/benchmark_decode.py --config=configs/benchmark_decode.py:paper    # the 228M model, context 4,096

The small model is trained and measured in float32, the large one in bfloat16; --config.model.compute_dtype= chooses
another. The settings are for a CPU with two cores: the small model splits its lanes between them, the large one each of
its products. On accelerators --config.mesh.data=-1 takes them all.
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(variant: str = "laptop") -> ConfigDict:
    config = grpo.get_config(variant)
    config.name = f"benchmark_decode_{variant}"
    config.rollout.max_steps = config.model.max_seq_len
    config.mesh.data = 2 if variant in ("laptop", "smoke") else 1
    if variant == "laptop":
        # Shorter visits than in training: fewer lanes idle, and the host still keeps up (docs/decode.md).
        config.engine.steps_per_visit = 10
    return config
