import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from apr_jax.config import Config, ConfigError
from apr_jax.data import demonstrations, shards
from apr_jax.data.demonstrations import DatasetError, dataset_folder, fingerprint, load_split
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.tasks import task_of
from apr_jax.tasks.base import SPLITS, Demonstration, split_size
from apr_jax.tasks.dialect import Dialect
from apr_jax.tasks.generation import generate_split
from tests.data.conftest import small_config


@pytest.mark.parametrize("split", SPLITS)
def test_splits_hold_what_the_solvers_wrote(config: Config, train, split):
    source = load_split(config, split)
    expected = list(generate_split(config, split))
    assert list(source) == expected
    assert len(source) == split_size(config.data, split)
    assert source[-1] == expected[-1]
    assert source[2:9:3] == expected[2:9:3]
    assert isinstance(source[0], Demonstration)
    with pytest.raises(IndexError):
        source[len(source)]


def test_held_out_problems_are_not_in_train(config: Config, train):
    seen = {demonstration.problem.key for demonstration in train}
    targets = {demonstration.problem.target for demonstration in train}
    for split in ("test", "test_unseen_targets"):
        assert not seen & {demonstration.problem.key for demonstration in load_split(config, split)}
    assert not targets & {demonstration.problem.target for demonstration in load_split(config, "test_unseen_targets")}


def test_serial_budgets_are_counted_in_the_tokenizers_tokens(tmp_path: pathlib.Path):
    config = small_config(tmp_path, method="serial", condition_on_budget=True, num_train=12)
    tokenizer = BuiltinTokenizer()
    for demonstration in load_split(config, "train"):
        (call,) = demonstration.calls
        budget = int(call.context.removeprefix("Token Budget: ").split()[0])
        assert budget % 512 == 0
        assert len(tokenizer.encode(call.completion)) <= budget or budget == 4096


def test_no_tensorflow_is_needed(config: Config, train):
    code = (
        "import pathlib, sys; from apr_jax.data import demonstrations, pipeline; from tests.data import conftest\n"
        f"config = conftest.small_config(pathlib.Path({config.data.directory!r}))\n"
        "demonstrations.load_split(config, 'test')[0]\n"
        "assert 'tensorflow' not in sys.modules"
    )
    root = pathlib.Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_processes_that_build_alone_agree_on_the_digest(config: Config, train, tmp_path: pathlib.Path):
    code = (
        "import pathlib; from apr_jax.data import demonstrations; from tests.data import conftest\n"
        f"config = conftest.small_config(pathlib.Path({str(tmp_path)!r}))\n"
        "print(demonstrations.load_split(config, 'train').digest())"
    )
    root = pathlib.Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == train.digest(), done.stderr


def _with(config: Config, **sections: dict[str, object]) -> Config:
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    if sections.get("task", {}).get("spawn_depth"):
        changed["rollout"] = dataclasses.replace(config.rollout, max_depth=2)
    return dataclasses.replace(config, **changed)


def test_the_folder_depends_on_what_the_data_depend_on_and_on_nothing_else(config: Config):
    task = config.task
    names = {fingerprint(config), fingerprint(dataclasses.replace(config, seed=config.seed + 1))}
    fields = [field for field in dataclasses.fields(task) if field.name != "name"]
    needs = {
        "restate": {"search_order": "depth_first"},
        "restate_operation": {"search_order": "depth_first", "restate": True},
        "attempts": {"heuristic": "none", "shuffle": False},
    }
    for field in fields:
        value = getattr(task, field.name)
        changed: object
        if field.name == "serial_beam_min":
            changed = value
        elif isinstance(value, tuple):
            changed = (1, *value)
        elif field.name == "spawn_depth":
            changed = value + 1
        elif isinstance(value, str):
            changed = "mult" if value == "none" else "none"
        else:
            changed = not value if isinstance(value, bool) else value / 2 if isinstance(value, float) else value + 1
        names.add(fingerprint(_with(config, task={**needs.get(field.name, {}), field.name: changed})))
    assert len(names) == 2 + len(fields) - 1
    same = _with(config, data=dict(directory="x", num_workers=7, replay_weight=9.0, loss_on_context=True))
    same = _with(same, data=dict(facts_share=0.5))
    assert fingerprint(same) == fingerprint(config)
    for change in ({"num_train": 65}, {"num_test": 17}, {"method": "serial"}):
        names.add(fingerprint(_with(config, data=change)))
    assert len(names) == 2 + len(fields) - 1 + 3


def test_a_tokenizer_matters_only_where_budgets_are_counted_in_it(config: Config, tmp_path: pathlib.Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for method, condition_on_budget, matters in [
        ("serial", True, True),
        ("serial", False, False),
        ("adaptive", True, False),
    ]:
        one = _with(config, data=dict(method=method, condition_on_budget=condition_on_budget))
        other = _with(one, data=dict(tokenizer=str(tmp_path / "tokenizer.json")))
        assert (fingerprint(one) != fingerprint(other)) == matters


def test_an_interrupted_build_leaves_no_data_set(tmp_path: pathlib.Path):
    config = small_config(tmp_path, num_train=12)

    def interrupt(split: str, done: int, total: int) -> None:
        if split == "train" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_split(config, "train", on_progress=interrupt)
    assert not dataset_folder(config).exists()
    seen: list[tuple[str, int, int]] = []
    assert len(load_split(config, "train", on_progress=lambda *step: seen.append(step))) == 12
    assert [step for step in seen if step[0] == "train"] == [("train", i + 1, 12) for i in range(12)]
    load_split(config, "test", on_progress=lambda *step: pytest.fail("built twice"))


def _delete(folder: pathlib.Path) -> None:
    (folder / "dataset_info.json").unlink()


def _truncate(folder: pathlib.Path) -> None:
    (path,) = folder.glob("*-train.array_record*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove_shard(folder: pathlib.Path) -> None:
    next(folder.glob("*-train.array_record*")).unlink()


def _empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _overwrite(folder: pathlib.Path) -> None:
    (path,) = folder.glob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 64] = bytes(64)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_delete, _truncate, _remove_shard, _empty, _overwrite])
def test_a_broken_data_set_is_named_with_what_to_do(config: Config, train, tmp_path: pathlib.Path, damage):
    copy = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=str(tmp_path)))
    shutil.copytree(dataset_folder(config), dataset_folder(copy))
    damage(dataset_folder(copy))
    with pytest.raises(DatasetError, match="Delete the folder") as error:
        list(load_split(copy, "train"))
    assert str(dataset_folder(copy)) in str(error.value)


@pytest.mark.parametrize("split", SPLITS)
def test_a_data_set_of_other_code_is_refused(config: Config, train, split, monkeypatch):
    """Who changes how a task is spelt must not go on with the demonstrations of before."""
    load_split(config, split)
    dialect = type(task_of(config).dialect("adaptive", Dialect))
    write = dialect.demonstrate

    def demonstrate(*arguments, **options):
        return tuple(
            dataclasses.replace(call, completion=call.completion + "!") for call in write(*arguments, **options)
        )

    monkeypatch.setattr(dialect, "demonstrate", demonstrate)
    with pytest.raises(DatasetError, match=rf"other code .* problem 0 of {split} .*Delete the folder") as error:
        load_split(config, split)
    assert str(dataset_folder(config)) in str(error.value)


def test_impossible_settings_are_refused_before_anything_is_written(tmp_path: pathlib.Path):
    config = _with(small_config(tmp_path / "data"), task=dict(num_unseen_targets=31))
    with pytest.raises(ConfigError, match="num_unseen_targets=31"):
        load_split(config, "train")
    assert not (tmp_path / "data").exists()


def test_the_builder_is_a_tfds_builder(config: Config, train):
    builder = demonstrations.make_builder(config)
    assert set(builder.info.splits) == set(SPLITS)
    record = builder.as_data_source("train")[0]
    assert record["index"] == 0
    assert json.loads(record["problem"])["target"] == train[0].problem.target
    assert record["calls"]["completion"][0].decode() == train[0].calls[0].completion


def test_a_data_set_larger_than_a_buffer_or_a_file_is_the_same(config: Config, train, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1_000)  # of TFDS's own writer, which needs TensorFlow then
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=str(tmp_path)))
    assert list(load_split(elsewhere, "train")) == list(train)
    info = demonstrations.make_builder(elsewhere).info.splits["train"]
    assert info.num_shards > 5
    assert info.num_bytes == demonstrations.make_builder(config).info.splits["train"].num_bytes
    names = {path.name for path in dataset_folder(elsewhere).glob("*-train.*")}
    assert names == {f"demonstrations-train.array_record-{i:05}-of-{len(names):05}" for i in range(info.num_shards)}
    read = tfds.builder_from_directory(str(dataset_folder(elsewhere))).as_data_source("train")  # without our builder
    assert [record["index"] for record in read] == list(range(len(train)))
