"""Decode throughput: the models and engines of configs/grpo.py, measured with random weights.

python launch/benchmark_decode.py --config=configs/benchmark_decode.py          # :laptop
python launch/benchmark_decode.py --config=configs/benchmark_decode.py:paper    # the 228M model, context 4,096
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(variant: str = "laptop") -> ConfigDict:
    config: ConfigDict = runpy.run_path(str(pathlib.Path(__file__).with_name("grpo.py")))["get_config"](variant)
    config.name = f"benchmark_decode_{variant}"
    return config
