"""Hugging Face folders as downloads, disks and strangers leave them. Each case damages a good folder in one way."""

import json
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.model.weights.tensors import INDEX, WEIGHTS
from tests.train.small import small_config

Damage = Callable[[pathlib.Path], object]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
NORM, HEAD = "model.norm.weight", "lm_head.weight"
MODEL = small_config(**{"model.tie_embeddings": False, "model.num_layers": 2}).model


def write_good(folder: pathlib.Path) -> pathlib.Path:
    """Write a folder that loads, of two layers and the built-in vocabulary."""
    save_hf(folder, MODEL, init_params(MODEL, 0), BuiltinTokenizer())
    return folder


def shard(folder: pathlib.Path) -> None:
    """Split the weights into two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names, weight_map = sorted(tensors), {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = names[number - 1 :: 2]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def raw(name: str, data: bytes) -> Damage:
    """Write a file's bytes."""
    return lambda folder: (folder / name).write_bytes(data)


def edit(name: str, **values: Any) -> Damage:
    """Change fields of a JSON file."""

    def damage(folder: pathlib.Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Replace a tensor."""

    def damage(folder: pathlib.Path) -> None:
        tensors = dict(load_file(folder / WEIGHTS))
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / WEIGHTS)

    return damage


def header(change: Callable[[dict[str, Any]], object], data: Callable[[bytes], bytes] = bytes) -> Damage:
    """Change the header of the weights, so that it lies."""

    def damage(folder: pathlib.Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        values = json.loads(whole[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data(whole[8 + length :]))

    return damage


def mapped(value: Any) -> Damage:
    """Let the index name another file for a tensor."""

    def damage(folder: pathlib.Path) -> None:
        shard(folder)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NORM] = value
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def replaced(name: str, make: Callable[[pathlib.Path], object]) -> Damage:
    """Put something that is no file in a file's place."""

    def damage(folder: pathlib.Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change tokenizer.json's contents."""

    def damage(folder: pathlib.Path) -> None:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


def linked_away(name: str) -> Damage:
    """Make a file a link to a good file outside the folder."""

    def damage(folder: pathlib.Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def _in_json() -> dict[str, Damage]:
    texts = {
        "empty": b"",
        "torn": b'{"a": [1, 2',
        "a list": b"[]",
        "a number": b"3",
        "null": b"null",
        "lfs": LFS,
        "brackets": b"[" * 100_000,
        "braces": b'{"a":' * 100_000,
        "digits": b'{"vocab_size": ' + b"9" * 5_000 + b"}",
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "NUL": b"\0" * 64,
        "HTML": b"<!DOCTYPE html><html>404</html>",
    }
    cases: dict[str, Damage] = {
        f"{name} {kind}": raw(name, text) for name in JSON_FILES for kind, text in texts.items()
    }
    for name in (*JSON_FILES, WEIGHTS):
        cases[f"{name} a folder"] = replaced(name, pathlib.Path.mkdir)
        cases[f"{name} a pipe"] = replaced(name, os.mkfifo)
        cases[f"{name} linked away"] = linked_away(name)
        cases[f"{name} linked to a device"] = replaced(name, lambda path: path.symlink_to("/dev/zero"))
        cases[f"{name} linked to itself"] = replaced(name, lambda path: path.symlink_to(path))
    return cases


_CONFIG: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (10**9, -1, 0, "4", 2.5, True, [2], {}, 3, 1, None),
    "hidden_size": (2**31 - 1, 33, 0, None, "32"),
    "num_attention_heads": (3, 0, 10**9, 1.0),
    "num_key_value_heads": (3, -2, 2**40, False),
    "head_dim": (15, 0, 2**30),
    "vocab_size": (335, 10**9, 2**63, -336),
    "intermediate_size": (63, 10**9),
    "max_position_embeddings": (0, -1, 2**64, "x"),
    "rope_theta": (-1.0, 0, "1e4", [1], {}),
    "rms_norm_eps": (-1e-6, "x", []),
    "model_type": ("gpt2", "", 3, [], {}),
    "hidden_act": ("gelu", 3),
    "tie_word_embeddings": ("false", 0, 1, True),
    "rope_scaling": (3, "x", [], {"type": "yarn", "factor": 2.0}, {"rope_type": 3}),
    "rope_parameters": (3, {"rope_type": "dynamic"}, {"rope_theta": "x"}),
    "layer_types": (3, ["sliding_attention"], "full_attention", [3]),
    "quantization_config": ({"bits": 4}, 3),
    "attention_bias": (True, "no"),
    "sliding_window": ("x", -4),
    "eos_token_id": (10**6, -1, "2", True, [2, "x"], {}, 2.0),
    "bos_token_id": (10**6, [[]]),
}


def _in_values() -> dict[str, Damage]:
    cases = {
        f"{key}={value!r}": edit("config.json", **{key: value}) for key, values in _CONFIG.items() for value in values
    }
    for key in ("eos_token_id", "bos_token_id"):  # generation_config.json and the tokenizer's own go first
        for value in _CONFIG[key]:
            cases[f"{key}={value!r}"] = _all(_forget(key), edit("config.json", **{key: value}))
            cases[f"generation {key}={value!r}"] = _all(_forget(key), edit("generation_config.json", **{key: value}))
    for key in ("bos_token", "eos_token"):
        for value in ("<nowhere>", 3, {}, {"content": None}, ["</s>"], True):
            cases[f"{key}={value!r}"] = edit("tokenizer_config.json", **{key: value})
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        cases[f"rope_theta is {text}"] = _all(
            edit("config.json", rope_theta="X"),
            lambda folder, text=text: (folder / "config.json").write_text(  # type: ignore[misc]
                (folder / "config.json").read_text().replace('"X"', text)
            ),
        )
    return cases


def _all(*damages: Damage) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        for one in damages:
            one(folder)

    return damage


def _forget(key: str) -> Damage:
    """Leave config.json as the only file that states a token."""
    return _all(edit("generation_config.json", **{key: None}), edit("tokenizer_config.json", **{key[:-3]: None}))


def _in_weights() -> dict[str, Damage]:
    def offsets(*pair: int) -> Damage:
        return header(lambda values: values[NORM].update(data_offsets=list(pair)))

    def set_first(number: float) -> Callable[[np.ndarray], np.ndarray]:
        def change(array: np.ndarray) -> np.ndarray:
            array = array.copy()
            array.flat[-1] = number
            return array

        return change

    cases: dict[str, Damage] = {
        "weights empty": raw(WEIGHTS, b""),
        "weights lfs": raw(WEIGHTS, LFS),
        "weights HTML": raw(WEIGHTS, b"<html>" + b" " * 500),
        "weights half": lambda folder: os.truncate(folder / WEIGHTS, 20_000),
        "weights short by one": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1),
        "weights with a tail": header(lambda values: None, lambda data: data + b"x"),
        "header of 2**63": raw(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
        "header of 99 MB": raw(WEIGHTS, struct.pack("<Q", 99_000_000) + b"{}"),
        "header of brackets": raw(WEIGHTS, struct.pack("<Q", 100_000) + b"[" * 100_000),
        "header a list": raw(WEIGHTS, struct.pack("<Q", 2) + b"[]"),
        "offsets beyond": offsets(0, 2**40),
        "offsets reversed": offsets(128, 0),
        "offsets negative": offsets(-128, 0),
        "offsets shared": offsets(0, 128),
        "shape lies": header(lambda values: values[NORM].update(shape=[33])),
        "shape huge": header(lambda values: values[NORM].update(shape=[2**62, 4])),
        "shape of six": header(lambda values: values[NORM].update(shape=[32, 1, 1, 1, 1, 1])),
        "shape negative": header(lambda values: values[NORM].update(shape=[-32])),
        "dtype unknown": header(lambda values: values[NORM].update(dtype="F33")),
        "dtype wrong": header(lambda values: values[NORM].update(dtype="F64")),
        "dtype a number": header(lambda values: values[NORM].update(dtype=32)),
        "name missing": header(lambda values: values.update(other=values.pop(NORM))),
        "no weights": lambda folder: (folder / WEIGHTS).unlink(),
        "only pickles": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "only pickled shards": _all(
            lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model-00001-of-00001.bin"),
            lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"),
        ),
        "index torn": _all(shard, raw(INDEX, b'{"weight_map": {')),
        "index empty map": _all(shard, raw(INDEX, b'{"weight_map": {}}')),
        "index a list": _all(shard, raw(INDEX, b"[]")),
        "index a pipe": _all(shard, replaced(INDEX, os.mkfifo)),
        "shard missing": _all(shard, lambda folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        "shard a folder": _all(shard, replaced("model-00002-of-00002.safetensors", pathlib.Path.mkdir)),
        "shard a pipe": _all(shard, replaced("model-00002-of-00002.safetensors", os.mkfifo)),
        "shard linked away": _all(shard, linked_away("model-00002-of-00002.safetensors")),
        "shard lfs": _all(shard, raw("model-00002-of-00002.safetensors", LFS)),
    }
    for number in ("nan", "inf", "-inf"):
        for name in (NORM, HEAD, "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
            cases[f"{name} holds {number}"] = tensor(name, set_first(float(number)))
    cases["1e300 is no float32"] = tensor(NORM, lambda array: set_first(1e300)(array.astype(np.float64)))
    for dtype in (np.int32, np.uint8, np.int64, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn):
        cases[f"weights of {np.dtype(dtype)}"] = tensor(NORM, lambda array, dtype=dtype: array.astype(dtype))  # type: ignore[misc]
    for value in ("/etc/passwd", "../outside", "a/b", "./model.safetensors", "", ".", "..", "\0", 3, None, ["x"], {}):
        cases[f"index names {value!r}"] = mapped(value)
    return cases


def _in_tokenizer() -> dict[str, Damage]:
    def model(**values: Any) -> Damage:
        return vocabulary(lambda whole: whole["model"].update(values))

    def word(key: str, index: Any) -> Damage:
        return vocabulary(lambda whole: whole["model"]["vocab"].update({key: index}))

    return {
        "tokenizer of another type": model(type="Magic"),
        "vocab a list": model(vocab=[]),
        "vocab null": model(vocab=None),
        "vocab without words": model(vocab={"<unk>": 9}),
        "id negative": word("7", -1),
        "id text": word("7", "x"),
        "id 2**32": word("7", 2**32),
        "id 2**32 - 1": word("extra", 2**32 - 1),
        "id above vocab_size": word("extra", 100_000),
        "a bad pattern": vocabulary(lambda whole: whole["pre_tokenizer"]["pattern"].update(Regex="((")),
        "added tokens null": vocabulary(lambda whole: whole.update(added_tokens=None)),
        "added id away": vocabulary(lambda whole: whole["added_tokens"][0].update(id=2**40)),
        "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
        "only SentencePiece": lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        "tokenizer lacks a model": vocabulary(lambda whole: whole.pop("model")),
    }


CASES: dict[str, Damage] = {**_in_json(), **_in_values(), **_in_weights(), **_in_tokenizer()}
