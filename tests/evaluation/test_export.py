"""Exported policies: everything comes back, and other programs find what they need."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from apr_jax.checkpoints.identity import own_tokenizer, same_tokenizer
from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import ConfigError
from apr_jax.config_dict import to_dict
from apr_jax.data.tokenizer import BuiltinTokenizer, Spelling, load_tokenizer
from apr_jax.evaluation.export import Exported, check_target, describe_dialect, export
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import hf_tensors
from tests.configs import LAPTOP
from tests.data.test_gguf_tokenizer import byte_level
from tests.model.weights.test_hf import assert_same_params


def trained() -> Exported:
    model = dataclasses.replace(LAPTOP.model, num_layers=1, embed_dim=32, mlp_dim=32, num_heads=1, num_kv_heads=1)
    config = dataclasses.replace(LAPTOP, model=model, mesh=dataclasses.replace(LAPTOP.mesh, data=1))
    return Exported(model, init_params(model, 0), BuiltinTokenizer(), config)


def from_elsewhere(folder: pathlib.Path, extra_rows: int = 0) -> Exported:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(byte_level("llama-bpe")))
    stated = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), Spelling(encoding="whole"))
    model = dataclasses.replace(trained().model, vocab_size=tokenizer.vocab_size + extra_rows)
    return Exported(model, init_params(model, 1), tokenizer, None)


@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_a_trained_policy_comes_back_whole(name: str, tmp_path: pathlib.Path) -> None:
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    policy = trained()
    note = export(policy, tmp_path / name)
    model, params, saved = load_policy(tmp_path / name)
    assert model == policy.model
    assert saved == to_dict(policy.config)
    assert_same_params(params, policy.params)
    assert own_tokenizer(tmp_path / name, saved) == "builtin"
    assert ("llama.cpp knows no WordLevel tokenizer" in note) == name.endswith(".gguf")
    again = Exported.read(tmp_path / name)
    assert again.config == policy.config


@pytest.mark.parametrize("extra_rows", [0, 5])
@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_a_policy_from_elsewhere_comes_back_with_its_tokenizer_and_template(
    name: str, extra_rows: int, tmp_path: pathlib.Path
) -> None:
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    policy = from_elsewhere(tmp_path / "given", extra_rows)
    assert export(policy, tmp_path / name) == ""
    model, params, saved = load_policy(tmp_path / name)
    assert saved is None
    assert model == dataclasses.replace(policy.model, compute_dtype=model.compute_dtype, attention=model.attention)
    assert_same_params(params, policy.params)
    own = own_tokenizer(tmp_path / name, None)
    assert same_tokenizer(own, str(tmp_path / "given" / "tokenizer.json"))
    tokenizer = load_tokenizer(own, Spelling(encoding="whole", chat=True))
    assert tokenizer.chats
    assert tokenizer.eos_ids == (2, 3)


def test_there_and_back_through_both_kinds_changes_no_bit(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gguf")
    policy = from_elsewhere(tmp_path / "given")
    export(policy, tmp_path / "one.gguf")
    export(Exported.read(tmp_path / "one.gguf"), tmp_path / "folder")
    export(Exported.read(tmp_path / "folder"), tmp_path / "two.gguf")
    assert_same_params(load_policy(tmp_path / "two.gguf")[1], policy.params)


def test_a_quantised_file_is_smaller_and_near(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gguf")
    policy = trained()
    export(policy, tmp_path / "full.gguf")
    export(policy, tmp_path / "small.gguf", "Q8_0")
    assert (tmp_path / "small.gguf").stat().st_size < 0.7 * (tmp_path / "full.gguf").stat().st_size
    near = hf_tensors(load_policy(tmp_path / "small.gguf")[1])
    for name, array in hf_tensors(policy.params).items():
        np.testing.assert_allclose(near[name], array, atol=np.abs(array).max() / 100)


def test_a_server_is_told_where_spawns_begin_and_end(tmp_path: pathlib.Path) -> None:
    policy = trained()
    export(policy, tmp_path / "out")
    dialect = json.loads((tmp_path / "out" / "dialect.json").read_text())
    assert dialect == describe_dialect(policy)
    tokenizer = policy.tokenizer
    assert tokenizer.decode([dialect["mark_token_ids"]["spawn_end"]]) == dialect["marks"]["spawn_end"]
    assert dialect["stop_token_ids"] == [tokenizer.eos_id, dialect["mark_token_ids"]["spawn_end"]]
    assert dialect["stop_strings"] == []
    assert tokenizer.bos_id in dialect["banned_token_ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "## Spawns" in card


def test_marks_that_are_no_tokens_are_stop_strings(tmp_path: pathlib.Path) -> None:
    policy = dataclasses.replace(from_elsewhere(tmp_path / "given"), config=trained().config)
    dialect = describe_dialect(policy)
    assert dialect["stop_strings"] == [dialect["marks"]["spawn_end"]]
    assert dialect["stop_token_ids"] == [2, 3]


@pytest.mark.parametrize(
    ("name", "weight_type", "message"),
    [
        ("there", "F32", "there is something already"),
        ("there/file", "F32", "there is something already"),
        ("new", "Q8_0", "a Hugging Face folder holds F32 or BF16; name a FILE.gguf"),
        ("new.gguf", "Q2_K", "choose one of F32, F16"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, weight_type: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(ConfigError, match=message):
        check_target(tmp_path / name, weight_type)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["trained", "elsewhere"])
def test_transformers_runs_an_exported_folder(kind: str, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    policy: Any = trained() if kind == "trained" else from_elsewhere(tmp_path / "given")
    export(dataclasses.replace(policy, params=jax.tree.map(lambda leaf: leaf * 3, policy.params)), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Moving to Node #0\n" if kind == "trained" else "Hello world, it's 12345\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == policy.tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert torch.isfinite(logits).all()
    assert model.generation_config.eos_token_id in (policy.tokenizer.eos_id, list(policy.tokenizer.eos_ids))
