"""TensorBoard's event file, written by the thread that has the numbers, so that an error reaches it at once."""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from apr_jax.files import GrowingFile

_FLUSH_SECONDS = 10.0


class Board:
    """A writer of scalars to one event file in a folder. Its methods raise OSError where it cannot be written."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file, self._pending = GrowingFile(self._path), bytearray()
        self._flushed = 0.0
        self._add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add a step's scalars by their names, and write what has come about every ten seconds."""
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        summary = summary_pb2.Summary(value=values)
        self._add(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        pending, self._pending, self._flushed = bytes(self._pending), bytearray(), time.monotonic()
        self._file.add(pending)

    def close(self) -> None:
        """Write all that has come."""
        self.flush()
        self._file.sync()

    def _add(self, event: event_pb2.Event) -> None:
        """Add an event as a TFRecord: its length, its bytes, and a checksum of each."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._pending += length + struct.pack("<I", masked_crc32c(length))
        self._pending += data + struct.pack("<I", masked_crc32c(data))
