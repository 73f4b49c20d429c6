import pathlib
import tracemalloc

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from apr_jax.data import shards
from apr_jax.data.shards import write_split


@pytest.fixture
def template(tmp_path: pathlib.Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=tmp_path, dataset_name="numbers", split="train", filetype_suffix="array_record"
    )


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ([3], [1]),
        ([30], [1]),  # larger than a file should be
        ([5, 5], [2]),
        ([5, 5, 1], [2, 1]),
        ([6, 5, 5, 30, 1, 9, 1], [1, 2, 1, 2, 1]),
        ([0, 0, 10, 0, 1], [4, 1]),
    ],
)
def test_records_lie_in_order_in_files_of_at_most_that_size(template, monkeypatch, sizes, lengths):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10)
    records = [bytes([index]) * size for index, size in enumerate(sizes)]
    info = write_split(template, iter(records))
    assert info.shard_lengths == lengths
    assert info.num_bytes == sum(sizes)
    assert sorted(template.data_dir.iterdir()) == info.filepaths
    source = ArrayRecordDataSource([str(path) for path in info.filepaths])
    assert [source[index] for index in range(len(source))] == records


def test_memory_does_not_grow_with_the_split(template, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 8 << 20)
    tracemalloc.start()
    try:
        write_split(template, (bytes(1 << 20) for _ in range(32)))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_split_without_records_is_refused(template):
    with pytest.raises(ValueError, match="'train' has no records"):
        write_split(template, [])
