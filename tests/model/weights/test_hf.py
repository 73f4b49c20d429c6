"""Hugging Face folders: exact round trips, both styles of config.json, shards, and messages that name the fault."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from apr_jax.model import params as params_of
from apr_jax.model.views.training import training_rows
from apr_jax.model.weights.errors import HuggingFaceError
from apr_jax.model.weights.hf import load_hf, save_hf
from tests.configs import TINY_MODEL

ORACLES = pathlib.Path(__file__).parents[2] / "oracles"
BOTH = pytest.mark.parametrize("name", ["llama_tiny", "llama_tiny_gqa"])


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the GQA oracle that a test may spoil."""
    return shutil.copytree(ORACLES / "llama_tiny_gqa", tmp_path / "model")


def edit_config(folder: pathlib.Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_tensors(folder: pathlib.Path, remove: tuple[str, ...] = (), **tensors: np.ndarray) -> None:
    old = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in (old | tensors).items() if k not in remove}, folder / "model.safetensors")


def assert_same_params(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


class FakeTokenizer:
    bos_id, eos_id, pad_id = 1, 2, 0

    def save(self, folder: str | pathlib.Path) -> None:
        (pathlib.Path(folder) / "tokenizer.json").write_text("{}")


@BOTH
def test_round_trip_is_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    config, params = load_hf(ORACLES / name)
    save_hf(tmp_path / "out", config, params)
    again = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(ORACLES / name / "model.safetensors")
    assert again.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(again[key], tensor)
    config_again, params_again = load_hf(tmp_path / "out")
    assert config_again == config
    assert_same_params(params_again, params)
    theirs = json.loads((ORACLES / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: ours[key] for key in theirs.keys() & ours.keys()} == {
        key: theirs[key] for key in theirs.keys() & ours.keys()
    }


def test_tied_embeddings_are_stored_once(tmp_path: pathlib.Path) -> None:
    config, _ = load_hf(ORACLES / "llama_tiny_gqa")
    config = dataclasses.replace(config, tie_embeddings=True)
    params = params_of.init_params(config, 0)
    save_hf(tmp_path, config, params)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config_again, params_again = load_hf(tmp_path)
    assert config_again == config
    assert_same_params(params_again, params)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, **{"lm_head.weight": embedding})  # some writers store the tied head all the same
    assert_same_params(load_hf(tmp_path)[1], params)


def test_the_settings_that_hugging_face_lacks_are_arguments() -> None:
    config, _ = load_hf(ORACLES / "llama_tiny", compute_dtype="bfloat16", attention="splash", remat="full")
    assert (config.compute_dtype, config.attention, config.remat) == ("bfloat16", "splash", "full")
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps, config.max_seq_len) == (12, 10000.0, 1e-6, 128)


def test_config_of_transformers_4(folder: pathlib.Path) -> None:
    new = load_hf(folder)[0]
    edit_config(folder, remove=("rope_parameters", "head_dim"), rope_theta=500000.0, rope_scaling=None)
    assert load_hf(folder)[0] == new
    edit_config(folder, remove=("rope_theta", "rms_norm_eps", "tie_word_embeddings"))
    assert load_hf(folder)[0] == dataclasses.replace(new, rope_theta=10000.0, rms_norm_eps=1e-6)


def test_sharded_and_bfloat16_weights(folder: pathlib.Path) -> None:
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, params = load_hf(folder)
    assert params["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(params["embedding"][...], tensors["model.embed_tokens.weight"].astype(np.float32))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "gemma"}, "model_type='gemma' is not supported; the families here are 'llama', 'qwen2'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "says rope_type='default' and rope_scaling says 'llama3'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "says rope_type='default' and rope_scaling says 'linear'",
        ),
        ({"rope_theta": 7.0}, "rope_parameters says rope_theta=500000.0 and rope_theta says 7.0"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor is missing"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window=32 is not supported for a context of"),
        ({"model_type": "mistral"}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "sliding_window=16"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"num_attention_heads": 3}, "model.num_heads=3 must be a multiple"),
        ({"hidden_size": "64"}, "hidden_size='64' must be a whole number"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": 63}, r"embed_tokens.weight has shape \(64, 64\), and config.json says \(63, 64\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(16, 64\), and config.json says \(32, 64\)"),
        ({"num_hidden_layers": 1}, "model.layers.1.* has no place"),
        ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
    ],
)
def test_what_does_not_fit_is_named(folder: pathlib.Path, values: dict[str, Any], message: str | None) -> None:
    edit_config(folder, **values)
    if message is None:
        load_hf(folder)
        return
    with pytest.raises(HuggingFaceError, match=message):
        load_hf(folder)


def test_missing_and_unexpected_tensors_are_named(folder: pathlib.Path) -> None:
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    load_hf(folder)  # old checkpoints hold RoPE's frequencies: nothing to load
    edit_tensors(folder, remove=("lm_head.weight",))
    with pytest.raises(HuggingFaceError, match=r"lm_head.weight is missing"):
        load_hf(folder)
    edit_tensors(folder, **{"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)})
    with pytest.raises(HuggingFaceError, match=r"q_proj.bias has no place"):
        load_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        load_hf(folder)


def test_the_tokenizer_comes_along(tmp_path: pathlib.Path) -> None:
    config, params = load_hf(ORACLES / "llama_tiny")
    save_hf(tmp_path, config, params, FakeTokenizer())
    assert (tmp_path / "tokenizer.json").exists()
    for file in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 0)


@pytest.mark.peers
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_wrote(tied: bool, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        TINY_MODEL,
        vocab_size=77,
        num_layers=3,
        embed_dim=48,
        mlp_dim=56,
        num_heads=6,
        head_dim=10,
        max_seq_len=64,
        rope_theta=50000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        tie_embeddings=tied,
    )
    params = jax.tree.map(lambda leaf: leaf * 3, params_of.init_params(config, 0))
    save_hf(tmp_path, config, params, FakeTokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 33))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    model = nnx.merge(params_of.graphdef(config), params)
    positions = jnp.broadcast_to(jnp.arange(33)[None], (2, 33))
    hidden, _ = model(jnp.asarray(tokens, jnp.int32), training_rows(config, positions))
    np.testing.assert_allclose(model.logits(hidden), expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    config_again, params_again = load_hf(tmp_path / "theirs", attention="xla")
    assert config_again == config
    assert_same_params(params_again, params)
