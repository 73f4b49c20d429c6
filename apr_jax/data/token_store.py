"""Token ids of a split, made once and mapped into memory at every later start.

    DATA/tokens/NAME/KEY/about.json       what the ids were made from, and the type, length and checksum of each array
    DATA/tokens/NAME/KEY/tokens.bin, ..   the arrays of a `Calls`, one after the other as they lie in memory

KEY differs where the ids may: with the content of the data set's files, the tokenizer and how it spells, the length of
a row, and the method's kind of sequence. What else may have changed, such as this code, shows in the first
demonstrations, which are tokenised again at each start and compared.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from apr_jax.config import Config
from apr_jax.data.demonstrations import DemonstrationSource, dataset_folder, load_split
from apr_jax.data.pipeline import SequenceOptions, as_calls, calls_of, tokenize_arrays
from apr_jax.data.tokenized import Arrays, Calls
from apr_jax.data.tokenizer import Spelling, Tokenizer, config_tokenizer, tokenizer_digest
from apr_jax.files import FileError, crc_of, explain, naming, read_json, reading, write_json
from apr_jax.lock import locked
from apr_jax.tasks.base import Split, split_size
from apr_jax.tasks.workers import map_in_processes

_FORMAT = 1
_ABOUT = "about.json"
_MADE_AGAIN = "it is made again"
_PROBED = 8  # demonstrations that are compared
_CHUNK = 256  # demonstrations that are tokenised at a time
_WORTH_A_WORKER = 5_000  # demonstrations for which another process is worth its start


@dataclasses.dataclass(frozen=True)
class SplitTokenizer:
    """A maker of token ids of a range of a split's demonstrations. It pickles, and opens the split where it is."""

    config: Config
    split: Split
    options: SequenceOptions

    def __call__(self, chunk: range) -> Arrays:
        return tokenize_arrays((self._source[index] for index in chunk), self.tokenizer, self.options)

    @functools.cached_property
    def _source(self) -> DemonstrationSource:
        return load_split(self.config, self.split)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The configuration's tokenizer."""
        return config_tokenizer(self.config)

    def __reduce__(self) -> Any:
        return SplitTokenizer, (self.config, self.split, self.options)


class TokenStore:
    """The token ids of one split of a configuration's data set."""

    def __init__(self, config: Config, split: Split, options: SequenceOptions, digest: str) -> None:
        """Take the `digest` of the data set's files."""
        spelling = dataclasses.asdict(Spelling.of(config))
        made_from = {"format": _FORMAT, "data set": digest, "split": split, "row_len": options.row_len}
        made_from |= {"shared": options.shares_cache, "spelling": spelling}
        self._tokenize = SplitTokenizer(config, split, options)
        made_from["tokenizer"] = tokenizer_digest(self._tokenize.tokenizer)
        dataset, content = dataset_folder(config), json.dumps(made_from, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.path = dataset.parents[2] / "tokens" / dataset.parent.name / key
        self._made_from, self._options = json.loads(content), options
        self._reopen: Callable[[], Calls] | None = None  # once the store was found good
        self._size, self._workers = split_size(config.data, split), config.data.num_workers

    def read(self) -> Calls | None:
        """Return the split's calls as they lie in the store. Return None for no store, or a damaged one, and name that.

        Raises ValueError if no call fits into a row.
        """
        arrays = self._open()
        return None if arrays is None else calls_of(arrays, self._options)

    def make(self, on_progress: Callable[[int], object] = lambda _: None) -> Calls:
        """Tokenise the split, and return its calls. A second process that wants the same store waits for the first.

        Where none can be written a message says so, and the ids are held in memory.

        Args:
          on_progress: called with a number of further demonstrations that are done.
        Raises:
          ValueError: no call fits into a row, or the tokenizer cannot write a call's text.
          ChildProcessError: a worker process died.
        """
        arrays = None
        try:
            with locked(self.path.with_suffix(".lock"), "wait for it", lambda text: print(text, file=sys.stderr)):
                arrays = self._open()  # another process may have made it meanwhile
                if arrays is None:
                    self._write(on_progress)
                    arrays = self._open()
        except OSError as error:
            if isinstance(error, ChildProcessError):
                raise
            print(f"{explain(error)}; token ids are held in memory", file=sys.stderr)
        if arrays is None:
            parts = list(self._parts(on_progress))
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return calls_of(arrays, self._options)

    def reopener(self) -> Callable[[], Calls] | None:
        """Return a function that opens in another process what `read` or `make` returned; None where it is not kept."""
        return self._reopen

    def _parts(self, on_progress: Callable[[int], object]) -> Iterator[Arrays]:
        """Yield the arrays of all demonstrations, a chunk at a time."""
        chunks = [range(begin, min(begin + _CHUNK, self._size)) for begin in range(0, self._size, _CHUNK)]
        workers = max(1, min(self._workers, self._size // _WORTH_A_WORKER))
        for chunk, arrays in zip(chunks, map_in_processes(self._tokenize, chunks, workers), strict=True):
            yield arrays
            on_progress(len(chunk))

    def _write(self, on_progress: Callable[[int], object]) -> None:
        """Write the store into a folder of its own, which is renamed when it is whole."""
        new = self.path.with_suffix(".new")  # the lock is ours, so what lies there is a dead process's
        for doomed in (new, self.path):
            shutil.rmtree(doomed, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            with naming(new):
                arrays = _write_arrays(new, self._parts(on_progress))
            write_json(new / _ABOUT, {"made_from": self._made_from, "arrays": arrays}, sealed=True)
            new.rename(self.path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    def _open(self) -> Arrays | None:
        """Return the arrays of the store; None where there is none, or where it is not what it should be."""
        path = self.path / _ABOUT
        try:
            about = read_json(path, _MADE_AGAIN, sealed=True, arrays=dict)
            with reading(path, _MADE_AGAIN):
                for name, entry in about["arrays"].items():
                    _check(self.path / f"{name}.bin", **entry)
                arrays = _map(self.path, about["arrays"])
                self._probe(arrays)
            self._reopen = functools.partial(_calls_in, self.path, about["arrays"], self._options)
            return arrays
        except FileNotFoundError as error:
            if self.path.exists():
                print(f"{error.filename}: is missing; {_MADE_AGAIN}", file=sys.stderr)
        except FileError as error:
            print(error, file=sys.stderr)
        return None

    def _probe(self, arrays: Arrays) -> None:
        """Raise FileError unless the arrays begin with what the first demonstrations become today."""
        for name, now in self._tokenize(range(min(_PROBED, self._size))).items():
            if name != "dropped" and not np.array_equal(arrays[name][: len(now)], now):
                raise FileError(f"{self.path}: its {name} are of another version of this program; {_MADE_AGAIN}")


def _write_arrays(folder: pathlib.Path, parts: Iterable[Arrays]) -> dict[str, dict[str, Any]]:
    """Write each array to a file, a part at a time. Return what `_check` and `_map` need to read it."""
    entries: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for part in parts:
            for name, array in part.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.bin").open("wb"))
                    entries[name] = {"dtype": str(array.dtype), "size": 0, "crc32": 0}
                data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
                files[name].write(data)
                entry = entries[name]
                entry |= {"size": entry["size"] + array.size, "crc32": zlib.crc32(data, entry["crc32"])}
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return entries


def _check(path: pathlib.Path, dtype: str, size: int, crc32: int) -> None:
    """Raise FileError unless an array's file is as it was written."""
    there, wanted = path.stat().st_size, size * np.dtype(dtype).itemsize
    if there != wanted:
        raise FileError(f"{path}: has {there:,} of {wanted:,} bytes; {_MADE_AGAIN}")
    if size and crc_of(path) != crc32:
        raise FileError(f"{path}: has another checksum than when it was written; {_MADE_AGAIN}")


def _map(folder: pathlib.Path, entries: dict[str, dict[str, Any]]) -> Arrays:
    """Map the arrays of a folder into memory."""
    return {
        name: np.asarray(np.memmap(folder / f"{name}.bin", entry["dtype"], "r"))
        if entry["size"]
        else np.zeros(0, entry["dtype"])
        for name, entry in entries.items()
    }


def _calls_in(folder: pathlib.Path, entries: dict[str, dict[str, Any]], options: SequenceOptions) -> Calls:
    return as_calls(_map(folder, entries), options)
