"""The files of a TFDS split, written record by record, so that memory does not grow with the split.

TFDS's own writer gathers a split before it writes the first file: in memory, and above a gigabyte in temporary files
that only TensorFlow opens.
"""

from collections.abc import Iterable

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

SHARD_BYTES = 128 << 20  # TFDS, too, writes one file up to this size
_UNNUMBERED = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"  # while nobody knows how many files there will be
_RANDOM_ACCESS = "group_size:1"  # each record can be read alone: TFDS's setting


def write_split(template: tfds.core.ShardedFileTemplate, records: Iterable[bytes]) -> tfds.core.SplitInfo:
    """Write records in order to array_record files of at most SHARD_BYTES (or of one record), before compression.

    Args:
      template: the folder, which exists, and names of the files.
      records: serialised examples, at least one.

    Returns:
      what `DatasetInfo.set_splits` wants to know about the split.
    """
    unnumbered = template.replace(template=_UNNUMBERED)
    writer = None
    lengths: list[int] = []
    size = num_bytes = 0
    for record in records:
        if writer is None or size + len(record) > SHARD_BYTES:
            if writer is not None:
                writer.close()
            path = unnumbered.sharded_filepath(shard_index=len(lengths), num_shards=None)
            writer = ArrayRecordWriter(str(path), _RANDOM_ACCESS)
            lengths.append(0)
            size = 0
        writer.write(record)
        lengths[-1] += 1
        size += len(record)
        num_bytes += len(record)
    if writer is None:
        raise ValueError(f"the split {template.split!r} has no records")
    writer.close()
    for index, path in enumerate(template.sharded_filepaths(len(lengths))):
        unnumbered.sharded_filepath(shard_index=index, num_shards=None).rename(path)
    return tfds.core.SplitInfo(
        name=template.split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
