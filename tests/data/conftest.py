"""A small data set on disk, built once a test session, and the texts that its solvers wrote."""

import json
import pathlib

import pytest

from apr_jax.config import Config
from apr_jax.config_dict import from_config_dict
from apr_jax.data.demonstrations import DemonstrationSource, load_split
from configs.grpo import get_config

ORACLES = pathlib.Path(__file__).parent.parent / "oracles"


def small_config(directory: pathlib.Path, **data: object) -> Config:
    config = get_config("smoke")
    config.data.update(directory=str(directory), num_workers=1, **data)
    return from_config_dict(config)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return small_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def train(config: Config) -> DemonstrationSource:
    return load_split(config, "train")


@pytest.fixture(scope="session")
def reference_texts() -> list[str]:
    """Every trace of the reference implementation: serial and parallel, spawns, children and joins."""
    texts: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, str):
            texts.append(value if value.endswith("\n") else value + "\n")
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    for line in (ORACLES / "reference_traces.jsonl").read_text().splitlines():
        trace = json.loads(line)
        collect([trace["serial_text"], trace["spawns"], trace["parent_final_text"]])
    return texts
