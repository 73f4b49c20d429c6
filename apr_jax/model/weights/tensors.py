"""Tensors of a Hugging Face folder: one safetensors file, or shards that an index assigns tensors to."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from apr_jax.files import FileError, file_in, read_json
from apr_jax.model.weights.errors import HuggingFaceError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FETCH_AGAIN = "fetch the file again"
_FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    """A tensor as its file's header describes it; `read` brings it into memory."""

    shape: tuple[int, ...]
    type: str  # in the words of safetensors: "F32"
    read: Callable[[], jax.Array]

    @property
    def is_float(self) -> bool:
        """True for numbers that weights may be."""
        return self.type in _FLOATS

    @property
    def type_name(self) -> str:
        """The type in NumPy's words: "int32" for "I32"."""
        kind = {"I": "int", "U": "uint"}.get(self.type[0], self.type[0].lower())
        return kind + self.type[1:].lower()


Tensors = Mapping[str, Tensor]


def open_tensors(folder: pathlib.Path) -> Tensors:
    """Open the folder's tensors by name. None is read yet.

    With an index, a tensor is read from the file that the index names, whatever else that or another file holds.

    Raises:
        FileNotFoundError: there is neither `model.safetensors` nor an index, or a shard is missing.
        HuggingFaceError: a file is damaged, or index and files contradict each other.
    """
    if os.path.lexists(folder / INDEX):
        return _sharded(folder, _weight_map(folder))
    if not os.path.lexists(folder / WEIGHTS):
        _refuse_pickles(folder)
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; a Hugging Face folder holds {WEIGHTS} or {INDEX}")
    return _open(folder, WEIGHTS)


def read_own_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Read a JSON object of the folder. Raise FileNotFoundError or HuggingFaceError where there is none."""
    with _named(folder / name):
        return read_json(file_in(folder, name), FETCH_AGAIN, HuggingFaceError)


def save_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], name: str = WEIGHTS) -> None:
    """Write all tensors as one file, whole or not at all, and remove the weights that the folder held before."""
    temporary = folder / f"{name}.incomplete"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # of any new file here; safetensors leaves one that nobody else can read
        # The old index goes first: a reader would follow it to the old shards.
        (folder / INDEX).unlink(missing_ok=True)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    for old in folder.glob("model-*-of-*.safetensors"):
        old.unlink()


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_own_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HuggingFaceError(f"{path}: it has no weight_map that says which file holds which tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or pathlib.PurePath(shard).name != shard:
            raise HuggingFaceError(f"{path}: {shard!r}, the file of tensor {name}, is not a plain file name")
    return weight_map


def _sharded(folder: pathlib.Path, weight_map: Mapping[str, str]) -> Tensors:
    files = {shard: _open(folder, shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise HuggingFaceError(f"{folder / shard}: tensor {name} is missing; {INDEX} says that it is in this file")
    unlisted = sorted((name, shard) for shard, held in files.items() for name in held if name not in weight_map)
    if unlisted:
        name, shard = unlisted[0]
        raise HuggingFaceError(f"{folder / shard}: tensor {name} is not listed in {INDEX} ({len(unlisted)} such)")
    return {name: files[shard][name] for name, shard in weight_map.items()}


def _open(folder: pathlib.Path, name: str) -> Tensors:
    """Return the tensors of one file."""
    path = folder / name
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face folder holds {WEIGHTS} or {INDEX} and its files")
    with _named(path):
        file: Any = safe_open(file_in(folder, name), framework="flax")
        headers = {tensor: file.get_slice(tensor) for tensor in list(file.keys())}
    return {
        tensor: Tensor(tuple(header.get_shape()), header.get_dtype(), functools.partial(_read, file, path, tensor))
        for tensor, header in headers.items()
    }


def _read(file: Any, path: pathlib.Path, name: str) -> jax.Array:
    with _named(path):
        tensor: jax.Array = file.get_tensor(name)
    return tensor


def _refuse_pickles(folder: pathlib.Path) -> None:
    """Raise HuggingFaceError for PyTorch's own files: reading one runs code that it holds."""
    for pattern in ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"):
        for path in sorted(folder.glob(pattern)):
            raise HuggingFaceError(
                f"{path}: PyTorch's pickles can run code and are not read; convert them with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Turn errors of the library, and of a file that is none, into one that names the file."""
    try:
        yield
    except (HuggingFaceError, FileNotFoundError):
        raise
    except FileError as error:
        raise HuggingFaceError(str(error)) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise HuggingFaceError(f"{path}: not a whole safetensors file ({error}); {FETCH_AGAIN}") from error
