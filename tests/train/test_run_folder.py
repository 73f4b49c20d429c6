"""A run's folder is held by host 0 for all, and every host must see that."""

import pytest

from apr_jax.config import ConfigError
from apr_jax.lock import LockedError, read_holder
from apr_jax.parallel import hosts
from apr_jax.train import run_folder
from apr_jax.train.run_folder import held


def test_a_folder_is_held_and_left(tmp_path):
    with held(tmp_path / "run"):
        assert read_holder(tmp_path / "run" / "lock")
        with pytest.raises(LockedError), held(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_a_host_that_does_not_see_the_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_SEEN_SECONDS", 0.1)
    monkeypatch.setattr(run_folder, "_POLL_SECONDS", 0.01)
    gather = hosts.gather

    def of_two(value, types=()):  # another host, which has a folder of its own
        other = run_folder._sees(tmp_path / "other" / "lock", {"pid": 1}) if value is True else value
        return [*gather(value, types), other]

    monkeypatch.setattr(hosts, "gather", of_two)
    said = r"host 1 does not see what host 0 writes to .*run; name a folder that all"
    with pytest.raises(ConfigError, match=said), held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
