"""GGUF files as models, written by our writer on the package gguf and read by our reader."""

import contextlib
import dataclasses
import pathlib
import struct
from typing import Any

import numpy as np
import pytest

from apr_jax.config import ConfigError, RopeScaling
from apr_jax.files import FileError
from apr_jax.gguf_file import gguf_in, open_gguf
from apr_jax.model.params import init_params
from apr_jax.model.rope import Frequencies
from apr_jax.model.weights.gguf import load_gguf
from apr_jax.model.weights.gguf_writer import TYPES, save_gguf
from apr_jax.model.weights.hf import hf_tensors, load_hf
from tests.model.weights.test_hf import assert_same_params
from tests.oracles.made_families import CASES, write_folder

gguf = pytest.importorskip("gguf")
SETTINGS: dict[str, Any] = {"compute_dtype": "float32", "attention": "xla", "remat": "none"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each family's model, and its GGUF file."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for case in CASES:
        write_folder(root / case, case)
        config, params = load_hf(root / case, attention="xla")
        path = root / f"{case}.gguf"
        save_gguf(path, config, params, {}, name=case)
        made[case] = (config, params, path)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_is_exact_for_every_family(models: Any, case: str) -> None:
    config, params, path = models[case]
    again, params_again = load_gguf(path, **SETTINGS)
    expected = vars(config) | {"family": "llama" if config.family == "mistral" else config.family}
    scaling = expected.pop("rope_scaling")
    assert {key: value for key, value in vars(again).items() if key != "rope_scaling"} == expected
    assert (again.rope_scaling is None) == (scaling is None)
    assert_same_params(params_again, params)


def test_rows_of_query_and_key_lie_as_llama_cpp_rotates_them(models: Any) -> None:
    config, params, path = models["llama"]
    stored = open_gguf(path).tensors["blk.1.attn_q.weight"].read()
    ours = hf_tensors(params)["model.layers.1.self_attn.q_proj.weight"]
    half = config.head_dim // 2
    for pair in range(half):  # of the second head
        np.testing.assert_array_equal(stored[config.head_dim + 2 * pair], ours[config.head_dim + pair])
        np.testing.assert_array_equal(stored[config.head_dim + 2 * pair + 1], ours[config.head_dim + half + pair])
    _, params, path = models["qwen2"]
    stored = open_gguf(path).tensors["blk.1.attn_q.bias"].read()
    np.testing.assert_array_equal(stored, hf_tensors(params)["model.layers.1.self_attn.q_proj.bias"])


@pytest.mark.parametrize("weight_type", TYPES)
def test_quantised_weights_are_what_the_package_dequantises(models: Any, weight_type: str, tmp_path) -> None:
    config, params, _ = models["llama"]
    save_gguf(tmp_path / "model.gguf", config, params, {}, name="model", weight_type=weight_type)
    _, loaded = load_gguf(tmp_path / "model.gguf", **SETTINGS)
    ours, exact = hf_tensors(loaded), hf_tensors(params)
    kind = gguf.GGMLQuantizationType[weight_type]
    for name, array in exact.items():
        fits = array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        wanted = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind) if fits else array
        np.testing.assert_array_equal(ours[name], wanted, err_msg=name)


@pytest.mark.parametrize(
    "name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "TQ1_0"]
)
def test_types_that_only_others_write_are_dequantised(name: str, tmp_path: pathlib.Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (3, size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    (tensor,) = open_gguf(tmp_path / "one.gguf").tensors.values()
    assert tensor.shape == (3, block)
    np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "head_dim"),
    [(8.0, 1.0, 4.0, 8192, 128), (32.0, 1.0, 4.0, 8192, 64), (4.0, 2.0, 6.0, 4096, 128), (8.0, 1.0, 4.0, 32, 16)],
)
@pytest.mark.parametrize("named", [True, False])
def test_llama_3s_rope_is_found_in_its_divisors(models, factor, low, high, original, head_dim, named, tmp_path) -> None:
    config = dataclasses.replace(
        models["llama"][0],
        head_dim=head_dim,
        rope_theta=5e5,
        rope_scaling=RopeScaling(
            factor=factor, low_frequency_factor=low, high_frequency_factor=high, original_max_seq_len=original
        ),
    )
    path = tmp_path / "model.gguf"
    save_gguf(path, config, init_params(config, 0), {}, name="model")
    if not named:  # as llama.cpp's own converter leaves it
        whole = path.read_bytes()
        path.write_bytes(
            whole.replace(b"rope.scaling.original_context_length", b"rope.scaling.0riginal_context_length")
        )
    again, _ = load_gguf(path, **SETTINGS)
    np.testing.assert_allclose(Frequencies.of(again).radians(), Frequencies.of(config).radians(), rtol=1e-4)
    if named and head_dim > 16:
        assert again == config


def test_a_split_file_is_read_as_one_and_a_folder_names_its_file(models: Any, tmp_path: pathlib.Path) -> None:
    config, params, path = models["llama"]
    with_all = open_gguf(path)
    names = sorted(with_all.tensors)
    for number, part in ((1, names[:5]), (2, names[5:])):
        writer = gguf.GGUFWriter(tmp_path / f"model-{number:05}-of-00002.gguf", "llama")
        for key, value in with_all.metadata.items():
            if number == 1 and key != "general.architecture":
                kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
                kind(key, value)
        for name in part:
            writer.add_tensor(name, with_all.tensors[name].read())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    found = gguf_in(tmp_path)
    assert found == tmp_path / "model-00001-of-00002.gguf"
    again, params_again = load_gguf(found, **SETTINGS)
    assert again == config
    assert_same_params(params_again, params)
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_gguf(found, **SETTINGS)
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="it holds 2 GGUF files; name one of them"):
        gguf_in(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a whole GGUF file"),
        (lambda data: b"GGU", "it ends early"),
        (lambda data: b"{}" + data, "it does not begin with GGUF"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (lambda data: data[:4] + struct.pack("<I", 7) + data[8:], "its version is 7"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "its version is 50331648"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 62) + data[16:], "it ends early|given twice|tensor"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 62) + data[24:], "not a whole GGUF file"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 63) + data[32:], "it ends early"),
        (lambda data: data[:100], "it ends early"),
        (lambda data: data[:-10], "it ends before tensor"),
        (lambda data: data.replace(b"output_norm.weight", b"output_n\xff\xferm.weig"), "not a whole GGUF file"),
        (lambda data: data.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "given twice"),
    ],
)
def test_a_damaged_file_is_one_sentence(models: Any, damage: Any, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(models["llama"][2].read_bytes()))
    with pytest.raises(FileError, match=message) as caught:
        load_gguf(path, **SETTINGS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_damage_is_a_sentence_or_other_weights(models: Any, tmp_path: pathlib.Path) -> None:
    whole, rng = models["llama"][2].read_bytes(), np.random.default_rng(0)
    header = whole.index(b"token_embd.weight") + 2_000
    path = tmp_path / "damaged.gguf"
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(header) if rng.random() < 0.2 else None])
        with contextlib.suppress(FileError):  # anything else fails
            load_gguf(path, **SETTINGS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "general.architecture",
            "gpt2",
            "general.architecture='gpt2' is not supported; those here are",
        ),
        ("llama.block_count", 3, "model.layers.2.input_layernorm.weight is missing; its metadata says"),
        ("llama.block_count", 2_000_000_000, "num_layers=2000000000 must be at most"),
        ("llama.block_count", 9_999, "is missing; its metadata says"),
        ("llama.embedding_length", 64, "has shape"),
        ("llama.attention.head_count", 0, "num_attention_heads=0 must be a whole number"),
        ("llama.attention.head_count", "four", "must be a whole number"),
        ("llama.attention.head_count_kv", 3, "must be a multiple of model.num_kv_heads=3"),
        ("llama.attention.value_length", 8, "attention.value_length=8 is not supported, only 16"),
        ("llama.rope.dimension_count", 8, "rope.dimension_count=8 is not supported, only 16"),
        ("llama.rope.freq_base", "high", "rope_theta='high' must be a number"),
        ("llama.rope.scaling.type", "yarn", "rope_type='yarn' is not supported"),
        ("llama.expert_count", 8, "expert_count=8 is not supported"),
        ("llama.attention.sliding_window", 16, "sliding_window=16 is not supported for a context"),
        ("general.alignment", 0, "general.alignment=0 is no alignment"),
    ],
)
def test_metadata_that_ask_for_another_model_are_named(models, key, value, message, tmp_path) -> None:
    source = open_gguf(models["llama"][2])
    metadata = dict(source.metadata) | {key: value}
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", metadata.pop("general.architecture"))
    for name, given in metadata.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(given)](name, given)
    for name, tensor in source.tensors.items():
        writer.add_tensor(name, tensor.read())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(FileError, match=message) as caught:
        load_gguf(tmp_path / "other.gguf", **SETTINGS)
    assert "other.gguf" in str(caught.value)
    assert "config.json" not in str(caught.value)
