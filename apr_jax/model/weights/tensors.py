"""Tensors of a Hugging Face folder: one safetensors file, or shards that an index assigns tensors to."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from apr_jax.files import read_json
from apr_jax.model.weights.errors import HuggingFaceError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FETCH_AGAIN = "fetch the file again"
_GIT_LFS = b"version https://git-lfs"

Readers = Mapping[str, Callable[[], jax.Array]]


def tensor_readers(folder: pathlib.Path) -> Readers:
    """Return a function for each tensor of the folder that reads it from its file.

    With an index, a tensor is read from the file that the index names, whatever else that or another file holds.

    Raises:
        FileNotFoundError: there is neither `model.safetensors` nor an index, or a shard is missing.
        HuggingFaceError: a file is damaged, or index and files contradict each other.
    """
    if (folder / INDEX).exists():
        return _sharded(folder, _weight_map(folder))
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; a Hugging Face folder holds {WEIGHTS} or {INDEX}")
    file = _open(folder / WEIGHTS)
    return {name: functools.partial(_read, file, folder / WEIGHTS, name) for name in list(file.keys())}


def save_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write all tensors as one file, whole or not at all, and remove the weights that the folder held before."""
    temporary = folder / f"{WEIGHTS}.incomplete"
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        # The old index goes first: a reader would follow it to the old shards.
        (folder / INDEX).unlink(missing_ok=True)
        os.replace(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    for old in folder.glob("model-*-of-*.safetensors"):
        old.unlink()


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_json(path, FETCH_AGAIN, HuggingFaceError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HuggingFaceError(f"{path}: it has no weight_map that says which file holds which tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or pathlib.PurePath(shard).name != shard:
            raise HuggingFaceError(f"{path}: {shard!r}, the file of tensor {name}, is not a plain file name")
    return weight_map


def _sharded(folder: pathlib.Path, weight_map: Mapping[str, str]) -> Readers:
    files = {shard: _open(folder / shard) for shard in sorted(set(weight_map.values()))}
    names = {shard: set(file.keys()) for shard, file in files.items()}
    for name, shard in weight_map.items():
        if name not in names[shard]:
            raise HuggingFaceError(f"{folder / shard}: tensor {name} is missing; {INDEX} says that it is in this file")
    unlisted = sorted((name, shard) for shard, held in names.items() for name in held if name not in weight_map)
    if unlisted:
        name, shard = unlisted[0]
        raise HuggingFaceError(f"{folder / shard}: tensor {name} is not listed in {INDEX} ({len(unlisted)} such)")
    return {name: functools.partial(_read, files[shard], folder / shard, name) for name, shard in weight_map.items()}


def _open(path: pathlib.Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face folder holds {WEIGHTS} or {INDEX} and its files")
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise HuggingFaceError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in {path.parent}")
    with _named(path):
        return safe_open(path, framework="flax")


def _read(file: Any, path: pathlib.Path, name: str) -> jax.Array:
    with _named(path):
        tensor: jax.Array = file.get_tensor(name)
    return tensor


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Turn errors of the library into one that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise HuggingFaceError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
