"""A task's demonstrations as a TFDS dataset of array_record files, built and read without TensorFlow.

    source = load_split(config, "train")      # builds the data set first, where it is not there yet
    source[17].calls[0].completion

The folder's name holds the task and a fingerprint of every setting that the demonstrations depend on, so different
settings never share a folder, and the data of a seed are the same whatever the number of workers. They depend on the
task's code, too: the first and the last of a split are made again and compared whenever it is opened.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from apr_jax.config import Config, DataConfig
from apr_jax.data.shards import write_split
from apr_jax.data.tokenizer import token_counter
from apr_jax.files import FileError, is_refusal, naming
from apr_jax.lock import locked
from apr_jax.paths import path_of
from apr_jax.tasks import task_of
from apr_jax.tasks.base import SPLITS, Call, Demonstration, OnProgress, Split, Task, split_size
from apr_jax.tasks.dialect import Dialect
from apr_jax.tasks.generation import demonstrate_again, draw_splits, map_split

# Fields of DataConfig that say where the data lie or how they are used later, not what they are.
_SPELLING = ("tokenizer", "add_marker_tokens", "encoding", "bos", "chat_template")
_NOT_IN_FINGERPRINT = ("directory", "num_workers", "replay_weight", "loss_on_context", "facts_share", *_SPELLING)


class DatasetError(FileError):
    """A data set on disk that cannot be used. The message names its folder and says what to do."""


@dataclasses.dataclass(eq=False)
class DemonstrationsConfig(tfds.core.BuilderConfig):
    """The settings that a data set is made from; `name` is the task's with their fingerprint."""

    config: Config | None = None
    on_progress: OnProgress | None = None


class Demonstrations(tfds.core.GeneratorBasedBuilder):
    """Problems of a task, and demonstrations of how to solve them."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Problems of any task, as JSON."}  # noqa: RUF012 (the base class's convention)
    BUILDER_CONFIGS: list[DemonstrationsConfig] = []  # noqa: RUF012

    def __init__(self, *, config: DemonstrationsConfig, data_dir: str) -> None:
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _create_builder_config(self, builder_config: Any, *_: Any, **__: Any) -> Any:
        """Keep TFDS from warning that the configuration is not one of a fixed list."""
        return builder_config

    def _log_download_bytes(self) -> None:
        """Keep TFDS from printing: nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Keep TFDS from printing."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Problems and demonstrations of how to solve them, as calls of threads (arXiv 2504.15466).",
            features=_features(),
            disable_shuffling=True,  # a split keeps its order
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Write the examples as they come. TFDS's way gathers a whole split first (see `shards`)."""
        splits = []
        for split, records in self._split_generators(dl_manager).items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=self.data_dir,
                dataset_name=self.name,
                split=split,
                filetype_suffix=self.info.file_format.file_suffix,
            )
            splits.append(write_split(template, records))
        self.info.set_splits(tfds.core.SplitDict(splits))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[bytes]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: Split) -> Iterator[bytes]:
        """Yield a split's examples as `write_split` takes them."""
        config, on_progress = self.builder_config.config, self.builder_config.on_progress
        done, total = 0, split_size(config.data, split)
        for records in map_split(_Serialiser(config), config, split, token_counter(config)):
            for record in records:
                yield record
                done += 1
                if on_progress is not None:
                    on_progress(split, done, total)


@dataclasses.dataclass(frozen=True)
class _Serialiser:
    """A function from demonstrations to serialised examples. It pickles, so that whoever makes them can call it."""

    config: Config

    def __call__(self, first: int, demonstrations: list[Demonstration]) -> list[bytes]:
        return [self._record(index, each) for index, each in enumerate(demonstrations, start=first)]

    def _record(self, index: int, demonstration: Demonstration) -> bytes:
        features, serializer = self._codec
        example = features.encode_example(_to_example(task_of(self.config), index, demonstration))
        # Deterministic: else the order of a record's fields, and so `digest`, differs from process to process.
        record: bytes = serializer.get_tf_example(example).SerializeToString(deterministic=True)
        return record

    @functools.cached_property
    def _codec(self) -> tuple[tfds.features.FeaturesDict, tfds.core.ExampleSerializer]:
        features = _features()
        return features, tfds.core.ExampleSerializer(features.get_serialized_info())

    def __reduce__(self) -> Any:
        return _Serialiser, (self.config,)


def _features() -> tfds.features.FeaturesDict:
    call = {
        "context": tfds.features.Text(),
        "completion": tfds.features.Text(),
        "depth": np.int32,
        "ends_in_spawn": np.bool_,
        "replay_start": np.int32,
    }
    features = {
        "index": np.int64,
        "problem": tfds.features.Text(),  # a JSON object (Task.describe)
        "method": tfds.features.Text(),
        "calls": tfds.features.Sequence(call),
        "answer": tfds.features.Text(),  # empty where there is none
        "correct": np.bool_,
    }
    return tfds.features.FeaturesDict(features)


class DemonstrationSource(Sequence[Demonstration]):
    """A split on disk: random access to its demonstrations, in order. Raises DatasetError where it cannot be read."""

    def __init__(self, task: Task, records: Sequence[Any], folder: pathlib.Path, split: str) -> None:
        self._task, self._records, self._folder, self._split = task, records, folder, split

    def digest(self) -> str:
        """Return a digest of the data set's files, all splits included. Reads them once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self._folder.glob("*.array_record*")):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} demonstrations, not {index}")
        index %= len(self)
        try:
            with naming(self._folder):
                demonstration = _from_example(self._task, self._records[index])
        except Exception as error:
            if is_refusal(error):
                raise
            raise _broken(self._folder, f"record {index} of {self._split} cannot be read ({error})") from error
        return demonstration


def fingerprint(config: Config) -> str:
    """Return 16 hexadecimal digits that differ where the demonstrations may differ."""
    data = config.data
    values = {key: value for key, value in dataclasses.asdict(data).items() if key not in _NOT_IN_FINGERPRINT}
    dialect = task_of(config).dialect(data.method, Dialect)
    if dialect.counts_tokens(config.task, budget=data.condition_on_budget):
        values["tokenizer"] = _tokenizer_fingerprint(data)  # what is counted is its tokens
    values["files"] = [hashlib.sha256(path_of(file).read_bytes()).hexdigest() for file in config.task.files]
    settings = {"task": dataclasses.asdict(config.task), "data": values, "seed": config.seed}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def make_builder(config: Config, on_progress: OnProgress | None = None) -> Demonstrations:
    """Return the builder of this configuration's data set, under `config.data.directory`."""
    builder_config = DemonstrationsConfig(name=_name(config), config=config, on_progress=on_progress)
    return Demonstrations(config=builder_config, data_dir=str(pathlib.Path(config.data.directory).absolute()))


def dataset_folder(config: Config) -> pathlib.Path:
    """Return the folder in which this configuration's data set lies, or will lie once it is built."""
    directory = pathlib.Path(config.data.directory).absolute()
    return directory / Demonstrations.name / _name(config) / str(Demonstrations.VERSION)


def load_split(config: Config, split: Split, on_progress: OnProgress | None = None) -> DemonstrationSource:
    """Return the demonstrations of a split. Build all splits first where the data set is absent.

    Building is atomic: it happens in a folder of its own that is renamed when complete, and a second process that wants
    the same data set waits for the first.

    Args:
      config: the run.
      split: "train", "validation", "test" or "test_unseen_targets".
      on_progress: called while building, after each demonstration.

    Raises:
      DatasetError: the folder is there, but the data set in it is broken, or other code made it.
      ConfigError: there are no such problems (`tasks.generation.draw_splits`).
      ChildProcessError: a worker process died while building.
    """
    folder = dataset_folder(config)
    if not folder.exists():
        draw_splits(config)  # refuses impossible settings before anything is written
        with locked(folder.parent / "build.lock", "wait for it", lambda text: print(text, file=sys.stderr)):
            if not folder.exists():  # not built meanwhile by the process we waited for
                _build(config, on_progress)
    try:
        with naming(folder):
            records = make_builder(config).as_data_source(split)
            num_records = len(records)
    except Exception as error:
        if is_refusal(error):
            raise
        raise _broken(folder, f"{split} cannot be opened ({error})") from error
    expected = split_size(config.data, split)
    if num_records != expected:
        raise _broken(folder, f"{split} has {num_records} records instead of {expected}")
    source = DemonstrationSource(task_of(config), records, folder, split)
    for index in (0, expected - 1):
        if source[index] != demonstrate_again(config, split, index, token_counter(config)):
            raise DatasetError(
                f"the data set in {folder} is of other code than today's, which demonstrates problem {index} of "
                f"{split} differently. Delete the folder and it will be built again"
            )
    return source


def _name(config: Config) -> str:
    return f"{config.task.name}-{fingerprint(config)}"


def _to_example(task: Task, index: int, demonstration: Demonstration) -> dict[str, Any]:
    return {
        "index": index,
        "problem": json.dumps(task.describe(demonstration.problem)),
        "method": demonstration.method,
        "calls": [vars(call) for call in demonstration.calls],
        "answer": demonstration.answer or "",
        "correct": demonstration.correct,
    }


def _from_example(task: Task, example: dict[str, Any]) -> Demonstration:
    calls = example["calls"]
    return Demonstration(
        problem=task.read_problem(json.loads(example["problem"])),
        method=example["method"].decode(),
        calls=tuple(
            Call(context.decode(), completion.decode(), int(depth), bool(ends_in_spawn), int(replay_start))
            for context, completion, depth, ends_in_spawn, replay_start in zip(
                *(calls[field.name] for field in dataclasses.fields(Call)), strict=True
            )
        ),
        answer=example["answer"].decode() or None,
        correct=bool(example["correct"]),
    )


def _tokenizer_fingerprint(data: DataConfig) -> Any:
    if data.tokenizer == "builtin":
        return data.tokenizer
    content = hashlib.sha256(path_of(data.tokenizer).read_bytes()).hexdigest()
    return [content, data.add_marker_tokens, data.encoding]


def _broken(folder: pathlib.Path, what: str) -> DatasetError:
    return DatasetError(f"the data set in {folder} is broken: {what}. Delete the folder and it will be built again")


def _build(config: Config, on_progress: OnProgress | None) -> None:
    tfds.disable_progress_bar()  # `on_progress` says how far the work is
    for leftover in dataset_folder(config).parent.glob("incomplete.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory() as downloads, naming(dataset_folder(config)):  # downloads stay empty
        make_builder(config, on_progress).download_and_prepare(download_dir=downloads)
