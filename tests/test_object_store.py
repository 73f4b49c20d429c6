"""Files of a run in an object store: whole or not at all, and what cannot lie there is refused in one sentence."""

import contextlib
import json
import pathlib
import sys
import threading
import time

import pytest

from apr_jax import lock
from apr_jax.checkpoints.integrity import CheckpointError, check_files, set_aside, write_sums
from apr_jax.checkpoints.phases import COMMITTED, steps_in
from apr_jax.config import ConfigError
from apr_jax.files import FileError, GrowingFile, explain, file_in, read_json, read_jsonl, write, write_json, writing
from apr_jax.lock import LockedError, locked, read_holder
from apr_jax.paths import StoreError, is_remote, local_path, path_of
from tests.object_store.server import PACKAGES


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder of a stand-in for a bucket, and the path that leads to it."""
    monkeypatch.setenv("OBJECT_STORE", str(tmp_path))
    monkeypatch.syspath_prepend(str(PACKAGES))
    return tmp_path / "bucket", path_of("gs://bucket/run")


@pytest.mark.parametrize(
    "name", ["s3://bucket/run", "gs:/bucket/run", "gs://", "gs:///run", "file:///tmp/run", "GS://b"]
)
def test_what_is_no_path_of_a_store_is_refused_and_makes_no_folder(name):
    with pytest.raises(ConfigError, match="gs://BUCKET/FOLDER"):
        path_of(name)
    with pytest.raises(ConfigError, match="must lie on this machine"):
        local_path(name, "a GGUF file")


@pytest.mark.parametrize("name", ["runs/a", "/tmp/a:/b", "a:b", ".", "a b"])
def test_other_names_are_paths_of_this_machine(name):
    assert path_of(name) == local_path(name, "a file") == pathlib.Path(name)
    assert not is_remote(path_of(name))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        path_of("gs://bucket/run")


def test_a_path_of_a_store_stays_one(store):
    bucket, run = store
    path = run / "a" / "b.json"
    assert is_remote(path)
    assert str(path.absolute()) == str(path.resolve()) == f"{path}" == "gs://bucket/run/a/b.json"
    write_json(path, {"a": 1})
    assert json.loads((bucket / "run" / "a" / "b.json").read_text()) == {"a": 1} == read_json(path)
    assert [str(found) for found in run.glob("*/*.json")] == [str(path)] == [str(found) for found in run.rglob("*")]
    assert path_of(path) == path
    assert path.stat().st_size == len(path.read_bytes())
    assert file_in(path.parent, "b.json") == path
    for read in (lambda: file_in(path.parent, "c.json"), (path.parent / "c.json").read_bytes):
        with pytest.raises(FileNotFoundError, match=r"no such .*'gs://bucket/run/a/c.json'"):
            read()
    assert list(run.glob("*.none")) == list((run / "none").rglob("*")) == read_jsonl(run / "none") == []


def test_a_write_that_fails_leaves_the_old_object(store):
    _, run = store
    write(run / "file", b"old")
    with contextlib.suppress(ZeroDivisionError), writing(run / "file") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (run / "file").read_bytes() == b"old"


def test_a_file_grows_where_objects_cannot(store, tmp_path):
    _, run = store
    for path in (run / "log", tmp_path / "log"):
        write(path, b"one\n")
        grown = GrowingFile(path)
        grown.sync()
        for line in (b"two\n", b"three\n"):
            grown.add(line)
        grown.sync()
        assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_what_the_store_refuses_is_one_sentence(store, monkeypatch):
    _, run = store

    def refuse(*_, **__):
        raise RuntimeError("Anonymous caller\ndoes not have storage.objects.create access")

    monkeypatch.setattr("gcsfs.GCSFileSystem._open", refuse)
    for use in (lambda: write(run / "file", b""), lambda: (run / "file").read_bytes(), (run / "file").read_text):
        with pytest.raises(StoreError) as error:
            use()
        assert explain(error.value).startswith("gs://bucket/run/file: Anonymous caller does not have storage.objects")
        assert "gcloud auth" in explain(error.value)


def test_a_damaged_object_is_named(store):
    _, run = store
    write(run / "file", b"{")
    with pytest.raises(FileError, match="gs://bucket/run/file: not JSON"):
        read_json(run / "file")


def test_a_lock_in_a_store_names_its_holder_and_outlives_no_process(store, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.0)
    _, run = store
    path = run / "lock"
    with locked(path, "wait"):
        assert read_holder(path)["pid"]
        with pytest.raises(LockedError, match=r"gs://bucket/run: process .* works here; wait"), locked(path, "wait"):
            pass
    assert not path.exists()
    elsewhere = {"host": "another", "pid": 7, "started": 1, "since": "then"}
    write_json(path, {**elsewhere, "renewed": time.time() - 10})
    with pytest.raises(LockedError, match="process 7 on another, since then"), locked(path, "wait"):
        pass
    for dead in ({"renewed": time.time() - 100}, {"renewed": None}, {}):
        write_json(path, {**elsewhere, **dead})
        with locked(path, "wait"):
            assert read_holder(path)["host"] != "another"


def test_of_two_that_lock_at_once_one_has_it(store, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.3)
    _, run = store
    started = iter(range(1, 9))
    monkeypatch.setattr(lock, "_started", lambda pid: next(started))  # as if of two processes
    ends = []

    def hold():
        try:
            with locked(run / "lock", "wait"):
                ends.append("held")
                time.sleep(0.6)
        except LockedError:
            ends.append("refused")

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["held", "refused"]


def test_a_checkpoint_counts_once_it_is_committed_and_its_sizes_are_compared(store):
    _, run = store
    for step in (1, 2):
        write(run / "sft" / str(step) / "policy" / "d", b"weights")
        write_sums(run / "sft" / str(step))
    write(run / "sft" / "1" / COMMITTED, b"")
    assert steps_in(run / "sft") == [1]
    folder = run / "sft" / "1"
    check_files(folder)
    write(folder / "policy" / "d", b"weight")
    with pytest.raises(CheckpointError, match="policy/d has 6 of 7 bytes"):
        check_files(folder)
    set_aside(folder, run / "unusable" / "sft-1", "damaged")
    assert (run / "unusable" / "sft-1" / "policy" / "d").read_bytes() == b"weight"
    assert not folder.exists()
    assert steps_in(run / "sft") == []


def test_no_folder_of_this_machine_was_made(store):
    assert not pathlib.Path("gs:").exists()
    assert "tensorflow" not in sys.modules
