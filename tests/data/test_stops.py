"""A signal while demonstrations are built or read is a stop, never a broken data set, and leaves nothing behind."""

import signal

import pytest

from apr_jax.data import demonstrations
from apr_jax.data.demonstrations import DatasetError, dataset_folder, load_split
from apr_jax.stopping import StoppedError, StopSignal
from apr_jax.tasks import generation
from tests.data.conftest import small_config

MOMENTS = {
    "searching": (generation, "demonstrate", 5),
    "writing": (demonstrations, "_to_example", 30),
    "writing the last split": (demonstrations, "_to_example", 110),
    "opening": (demonstrations, "_from_example", 1),
    "reading": (demonstrations, "_from_example", 7),
}


def _read(config):
    return [demonstration.answer for demonstration in load_split(config, "train")]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_a_stop(moment, number, tmp_path, monkeypatch):
    config = small_config(tmp_path)
    module, name, at = MOMENTS[moment]
    original, calls = getattr(module, name), iter(range(1, 10_000))

    def called(*args, **kwargs):
        if next(calls) == at:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, called)
        with StopSignal().listening() as stop, pytest.raises(StoppedError), stop.interrupting():
            _read(config)
    assert not list(tmp_path.rglob("incomplete.*"))
    assert len(_read(config)) == config.data.num_train


def test_what_a_killed_process_left_is_removed(tmp_path):
    config = small_config(tmp_path)
    left = dataset_folder(config).parent / "incomplete.ABC123_2.0.0"
    left.mkdir(parents=True)
    (left / "part").touch()
    _read(config)
    assert [path.name for path in dataset_folder(config).parent.iterdir() if path.name != "build.lock"] == ["2.0.0"]


def test_a_dead_worker_is_no_broken_data_set(tmp_path, monkeypatch):
    config = small_config(tmp_path)

    def dies(*_):
        raise ChildProcessError("worker process 1 was killed by SIGKILL")

    monkeypatch.setattr(generation, "map_in_processes", dies)
    with pytest.raises(ChildProcessError, match=r"^worker process 1 was killed by SIGKILL$") as caught:
        _read(config)
    assert not isinstance(caught.value, DatasetError)
