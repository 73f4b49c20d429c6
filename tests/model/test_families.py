"""Every family computes what transformers computes: logits, loss, gradients and greedy tokens, on every kernel path."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from apr_jax.config import EngineConfig, ModelConfig
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Decode, Open, Program, RolloutKey
from apr_jax.kernels import cpu_kernels, for_training
from apr_jax.model.families import FAMILIES
from apr_jax.model.params import Params, graphdef, init_params
from apr_jax.model.views.training import training_rows
from apr_jax.model.weights.hf import load_hf, save_hf
from apr_jax.model.weights.hf_config import read_config
from tests.engine.helpers import ROLLOUT, SIZES, make_mesh
from tests.oracles.made_families import CASES, tokens, write_folder

ORACLE = np.load(pathlib.Path(__file__).parents[1] / "oracles" / "families.npz")
EVERY = pytest.mark.parametrize("case", CASES)
KERNELS = ["xla", pytest.param("cpu", marks=pytest.mark.skipif(cpu_kernels("cpu") is None, reason="no C++ compiler"))]
# Of the tensors whose gradients the oracle holds: the place in our tree.
PLACES = {
    "model.embed_tokens.weight": ("embedding",),
    "model.layers.0.self_attn.q_proj.weight": ("blocks", 0, "attention", "query"),
    "model.layers.1.self_attn.k_proj.weight": ("blocks", 1, "attention", "key"),
    "model.layers.0.self_attn.k_proj.bias": ("blocks", 0, "attention", "key_bias"),
    "model.layers.0.self_attn.q_norm.weight": ("blocks", 0, "attention", "query_norm", "scale"),
    "model.layers.1.mlp.down_proj.weight": ("blocks", 1, "mlp", "down"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that loads a case's folder, once."""

    @functools.cache
    def load(case: str) -> tuple[ModelConfig, Params]:
        return load_hf(write_folder(tmp_path_factory.mktemp("families") / case, case), attention="xla")

    return load


def loss_and_logits(config: ModelConfig, kernels: str, params: Params, ids_BT: jax.Array) -> tuple[jax.Array, Any]:
    chosen = for_training(dataclasses.replace(config, attention=kernels), "cpu")
    model = nnx.merge(graphdef(config, chosen.ops if kernels == "cpu" else for_training(config, "none").ops), params)
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1])[None], ids_BT.shape)
    hidden, _ = model(ids_BT, training_rows(config, positions_BT, attention=chosen.attention))
    logits = model.logits(hidden)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, ids_BT[:, 1:, None], axis=-1)), logits


@pytest.mark.parametrize("kernels", KERNELS)
@EVERY
def test_logits_loss_and_gradients_equal_transformers(case: str, kernels: Any, loaded: Any) -> None:
    config, params = loaded(case)
    if kernels == "cpu" and config.head_dim % 16:
        pytest.skip("the CPU's attention takes heads that are a multiple of 16")
    step = jax.jit(jax.value_and_grad(functools.partial(loss_and_logits, config, kernels), has_aux=True))
    (loss, logits), grads = step(params, jnp.asarray(tokens(), jnp.int32))
    np.testing.assert_allclose(logits[:, ::8], ORACLE[f"{case}/logits"], atol=2e-4)
    np.testing.assert_allclose(loss, ORACLE[f"{case}/loss"], atol=2e-5)
    compared = 0
    for name, place in PLACES.items():
        if f"{case}/gradient/{name}" in ORACLE:
            theirs = ORACLE[f"{case}/gradient/{name}"]
            ours = functools.reduce(lambda tree, key: tree[key], place, grads)[...]
            ours = ours.T if ours.ndim == 2 and place != ("embedding",) else ours
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
            compared += 1
    assert compared == 4 + FAMILIES[config.family].biases + FAMILIES[config.family].head_norms


@pytest.mark.parametrize("attention", ["auto", "xla"])
@EVERY
def test_the_engine_decodes_the_greedy_tokens_of_transformers(case: str, attention: Any, loaded: Any) -> None:
    expected = ORACLE[f"{case}/greedy"].tolist()
    sizes = dataclasses.replace(SIZES, decode_attention=attention)
    config, params = loaded(case)
    assert greedy(config, params, sizes, make_mesh(), len(expected)) == expected


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_heads_split_over_the_mesh_decode_the_same(case: str, loaded: Any) -> None:
    config, params = loaded(case)
    assert greedy(config, params, SIZES, make_mesh(tensor=2), 16) == ORACLE[f"{case}/greedy"].tolist()


def greedy(config: ModelConfig, params: Params, sizes: EngineConfig, mesh: Mesh, count: int) -> Any:
    """The first `count` tokens that an engine decodes greedily after the oracle's prompt."""

    def program() -> Program:
        thread = yield Open(tokens()[0, :40].tolist())
        return (yield Decode(thread, ()))

    limits = dataclasses.replace(ROLLOUT, max_steps=count)
    engine = Engine(config, sizes, limits, mesh, params=params, banned_tokens=())
    (rollout,) = engine.run([(RolloutKey(0, 0), program())], seed=0, temperature=0.0)
    return rollout.calls[0].tokens.tolist()


@pytest.mark.parametrize(("shards", "dtype"), [(3, np.float32), (1, ml_dtypes.bfloat16), (2, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("case", ["llama3_tied", "qwen2", "qwen3", "mistral"])
def test_shards_and_types_load_the_same_weights(
    case: str, shards: int, dtype: Any, tmp_path: pathlib.Path, loaded: Any
) -> None:
    config, params = load_hf(write_folder(tmp_path / case, case, shards=shards, dtype=dtype), attention="xla")
    expected_config, expected = loaded(case)
    assert config == expected_config
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype(dtype).astype(np.float32))


@EVERY
def test_a_saved_folder_loads_the_same(case: str, tmp_path: pathlib.Path, loaded: Any) -> None:
    config, params = loaded(case)
    save_hf(tmp_path / "saved", config, params)
    config_again, params_again = load_hf(tmp_path / "saved", attention="xla")
    assert config_again == config
    for ours, theirs in zip(jax.tree.leaves(params_again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.peers
@EVERY
def test_transformers_loads_what_we_saved(case: str, tmp_path: pathlib.Path, loaded: Any) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = loaded(case)
    save_hf(tmp_path / "saved", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert theirs.config.model_type == FAMILIES[config.family].model_type
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens())).logits.numpy()
    np.testing.assert_allclose(logits[:, ::8], ORACLE[f"{case}/logits"], atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_silence_means_what_transformers_takes_it_for(family: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    given = {**sizes, "num_attention_heads": 4, "max_position_embeddings": 128, "num_key_value_heads": 2}
    facts = FAMILIES[family]
    theirs = transformers.AutoConfig.for_model(facts.model_type, **sizes, num_attention_heads=4).to_dict()
    for key, value in facts.silent.items():
        found = theirs["rope_parameters"]["rope_theta"] if key == "rope_theta" else theirs[key]
        assert found == value, key
    ours = read_config(
        {**given, "model_type": facts.model_type}, compute_dtype="float32", attention="xla", remat="none"
    )
    assert ours.family == family
    assert (ours.rope_theta, ours.rms_norm_eps, ours.tie_embeddings) == (10_000.0, 1e-6, False)


def test_fresh_weights_have_what_a_family_adds() -> None:
    config = dataclasses.replace(load_config("qwen2"), num_layers=1)
    block: Any = init_params(config, 0)["blocks"][0]["attention"]
    assert block["query_bias"].shape == (config.num_heads * config.head_dim,)
    assert not np.any(block["key_bias"][...])
    norms: Any = init_params(load_config("qwen3"), 0)["blocks"][0]["attention"]
    assert np.all(norms["query_norm"]["scale"][...] == 1)


def load_config(case: str) -> ModelConfig:
    return read_config(CASES[case], compute_dtype="float32", attention="xla", remat="none")
