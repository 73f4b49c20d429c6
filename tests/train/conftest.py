"""Equal programs are compiled once a session: tests build the same small trainers again and again."""

import jax
import pytest

from apr_jax.config import Config
from apr_jax.train.run import train
from tests.train.small import small_config


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Config:
    """A small run of both phases."""
    return small_config(
        **{"data.directory": str(tmp_path_factory.mktemp("data")), "grpo.num_steps": 2, "grpo.checkpoint_every": 1}
    )


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory):
    """The folder of an undisturbed run of `config`."""
    workdir = tmp_path_factory.mktemp("whole")
    train(config, workdir)
    return workdir
