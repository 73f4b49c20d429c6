"""Folders of tensors: the index is followed, what contradicts it is named, and saving leaves nothing old behind."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apr_jax.model.params import init_params
from apr_jax.model.weights.errors import HuggingFaceError
from apr_jax.model.weights.hf import load_hf, save_hf
from apr_jax.model.weights.tensors import INDEX, WEIGHTS
from tests.oracles.made_families import tensors_of, write_folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_folder(tmp_path / "sharded", "llama", shards=2)


@pytest.fixture
def single(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_folder(tmp_path / "single", "llama")


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def edit_index(folder: pathlib.Path, **changes: str) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"] | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_tensor_comes_from_the_file_that_the_index_names(sharded: pathlib.Path, single: pathlib.Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(name for name, shard in weight_map.items() if shard == FIRST)
    save_file(load_file(sharded / SECOND) | {name: 0 * tensors_of("llama")[name]}, sharded / SECOND)
    assert same(load_hf(sharded)[1], load_hf(single)[1])
    # So does a whole other file that lies beside the shards.
    save_file({key: 0 * tensor for key, tensor in tensors_of("llama").items()}, sharded / WEIGHTS)
    assert same(load_hf(sharded)[1], load_hf(single)[1])


def test_an_index_that_disagrees_with_its_files_is_refused(sharded: pathlib.Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    first = next(name for name, shard in weight_map.items() if shard == FIRST)
    edit_index(sharded, **{first: SECOND})
    with pytest.raises(HuggingFaceError, match=f"{SECOND}: tensor {first} is missing"):
        load_hf(sharded)
    edit_index(sharded, **{first: FIRST})
    save_file(load_file(sharded / FIRST) | {"extra": np.zeros(3, np.float32)}, sharded / FIRST)
    with pytest.raises(HuggingFaceError, match=f"{FIRST}: tensor extra is not listed"):
        load_hf(sharded)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.safetensors", "a/b.safetensors", "", "..", 3, None])
def test_an_index_names_plain_files_only(name: Any, sharded: pathlib.Path) -> None:
    edit_index(sharded, **{"model.norm.weight": name})
    with pytest.raises(HuggingFaceError, match="is not a plain file name"):
        load_hf(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_without_a_map_is_refused(content: str, sharded: pathlib.Path) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(HuggingFaceError, match="it has no weight_map"):
        load_hf(sharded)


def test_saving_over_shards_leaves_the_new_weights_alone(sharded: pathlib.Path) -> None:
    config, _ = load_hf(sharded)
    other = init_params(config, 3)
    save_hf(sharded, config, other)
    assert same(load_hf(sharded)[1], other)
    assert [path.name for path in sorted(sharded.glob("*model*"))] == [WEIGHTS]


def test_others_may_read_the_weights_if_they_may_read_the_rest(tmp_path: pathlib.Path, sharded: pathlib.Path) -> None:
    config, params = load_hf(sharded)
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            save_hf(tmp_path / str(umask), config, params)
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / str(umask)).iterdir()}
        assert set(modes) >= {WEIGHTS, "config.json"}
        assert set(modes.values()) == {mode}, modes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer.*git lfs pull"),
        (b"", "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
        (None, "not a whole safetensors file"),
    ],
)
def test_a_damaged_file_is_named(content: bytes | None, message: str, single: pathlib.Path) -> None:
    path = single / WEIGHTS
    path.write_bytes(path.read_bytes()[:5_000] if content is None else content)
    with pytest.raises(HuggingFaceError, match=f"{path}: {message}"):
        load_hf(single)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 5_000])
def test_a_torn_config_is_named(content: bytes, single: pathlib.Path) -> None:
    (single / "config.json").write_bytes(content)
    with pytest.raises(HuggingFaceError, match=f"{single / 'config.json'}: "):
        load_hf(single)
    (single / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_hf(single)


def test_integers_are_no_weights(single: pathlib.Path) -> None:
    tensors: dict[str, np.ndarray] = dict(load_file(single / WEIGHTS))
    tensors["model.norm.weight"] = np.ones(32, np.int32)
    save_file(tensors, single / WEIGHTS)
    with pytest.raises(HuggingFaceError, match=r"model\.norm\.weight holds int32"):
        load_hf(single)


def test_a_tied_head_that_differs_is_refused(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "tied", "smollm2")
    tensors = load_file(folder / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, folder / WEIGHTS)
    load_hf(folder)  # some writers store the tied head all the same
    head[0, 0] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / WEIGHTS)
    with pytest.raises(HuggingFaceError, match=r"tie_word_embeddings=true, and lm_head\.weight differs"):
        load_hf(folder)
