"""The model equals transformers' numbers: logits, loss, gradients, greedy tokens."""

import dataclasses
import pathlib
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.model import llama
from apr_jax.model import params as params_of
from apr_jax.model.ops import XLA, Ops
from apr_jax.model.rope import Frequencies, rope_angles
from apr_jax.model.views.training import training_rows
from apr_jax.model.weights.hf import load_hf
from tests.configs import TINY_MODEL
from tests.model.naive import naive_decode

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
BOTH = pytest.mark.parametrize("name", ["llama_tiny", "llama_tiny_gqa"])
TINY = dataclasses.replace(
    TINY_MODEL, vocab_size=61, embed_dim=24, mlp_dim=40, head_dim=6, max_seq_len=64, tie_embeddings=True
)
PAPER = dataclasses.replace(
    TINY,
    vocab_size=32000,
    num_layers=18,
    embed_dim=1024,
    mlp_dim=2752,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    max_seq_len=4096,
    tie_embeddings=False,
)


def positions_like(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]).reshape((1,) * (tokens.ndim - 1) + (-1,)), tokens.shape)


def next_token_loss(config: ModelConfig, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of each row's next tokens (transformers' loss for labels = inputs), and the logits."""
    model = nnx.merge(params_of.graphdef(config), params)
    hidden, _ = model(tokens_BT, training_rows(config, positions_like(tokens_BT)))
    logits = model.logits(hidden)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1)), logits


@nnx.jit
def forward(model: llama.Llama, tokens: jax.Array, positions: jax.Array, segment_ids: Any = None) -> jax.Array:
    return model(tokens, training_rows(model.config, positions, segment_ids))[0]


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


@BOTH
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_logits_loss_and_gradients_equal_transformers(name: str, remat: str) -> None:
    config, params = load_hf(ORACLES / name, attention="xla", remat=remat)
    expected = np.load(ORACLES / name / "expected.npz")
    step = jax.jit(jax.value_and_grad(lambda p, t: next_token_loss(config, p, t), has_aux=True))
    (loss, logits), grads = step(params, jnp.asarray(expected["input_ids"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    for ours, theirs in (
        (grads["embedding"][...], expected["grad_embed"]),
        (grads["blocks"][0]["attention"]["query"][...].T, expected["grad_q0"]),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@BOTH
def test_greedy_tokens_equal_transformers(name: str) -> None:
    config, params = load_hf(ORACLES / name)
    expected = np.load(ORACLES / name / "expected.npz")
    prompt, output = expected["greedy_prompt"][0].tolist(), expected["greedy_output"][0].tolist()
    model = nnx.merge(params_of.graphdef(config), params)
    new_tokens = output[len(prompt) :] if output[: len(prompt)] == prompt else output
    assert naive_decode(model, prompt, len(new_tokens)) == new_tokens


def test_leading_axes_are_free() -> None:
    model = nnx.merge(params_of.graphdef(TINY), params_of.init_params(TINY, 0))
    tokens = random_tokens((2, 3, 10))
    together = forward(model, tokens, positions_like(tokens))
    assert together.shape == (2, 3, 10, TINY.embed_dim)
    alone = forward(model, tokens[1, 2], positions_like(tokens[1, 2]))
    np.testing.assert_allclose(together[1, 2], alone, atol=1e-5)


def test_a_packed_row_equals_its_sequences() -> None:
    model = nnx.merge(params_of.graphdef(TINY), params_of.init_params(TINY, 0))
    tokens = random_tokens((12,))
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])
    segment_ids = jnp.asarray([1] * 5 + [2] * 7)
    packed = forward(model, tokens, positions, segment_ids)
    for part in (slice(0, 5), slice(5, 12)):
        alone = forward(model, tokens[part], positions[part])
        np.testing.assert_allclose(packed[part], alone, atol=1e-5)


def test_positions_are_relative_but_order_matters() -> None:
    model = nnx.merge(params_of.graphdef(TINY), params_of.init_params(TINY, 0))
    tokens = random_tokens((9,))
    hidden = forward(model, tokens, jnp.arange(9))
    shifted = forward(model, tokens, jnp.arange(9) + 20)
    np.testing.assert_allclose(hidden, shifted, atol=1e-4)
    stretched = forward(model, tokens, jnp.arange(9) * 3)
    assert jnp.max(jnp.abs(hidden - stretched)) > 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """The simplest view of one sequence: arrays [layers, S, K, H], and nothing outside what was written is seen."""

    keys: jax.Array
    values: jax.Array
    positions_T: jax.Array

    def angles(self) -> Any:
        return rope_angles(self.positions_T, Frequencies.of(TINY))

    def attend(self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> tuple[jax.Array, Self]:
        places = layer, self.positions_T
        keys, values = self.keys.at[places].set(k_TKH), self.values.at[places].set(v_TKH)
        groups = q_TNH.shape[1] // k_TKH.shape[1]
        k_SNH, v_SNH = jnp.repeat(keys[layer], groups, axis=1), jnp.repeat(values[layer], groups, axis=1)
        scores = jnp.einsum("TNH,SNH->NTS", q_TNH, k_SNH) / q_TNH.shape[-1] ** 0.5
        visible_TS = jnp.arange(keys.shape[1])[None, :] <= self.positions_T[:, None]
        weights = jax.nn.softmax(jnp.where(visible_TS[None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("NTS,SNH->TNH", weights, v_SNH), dataclasses.replace(self, keys=keys, values=values)


def test_decoding_with_a_cache_equals_the_whole_forward_also_under_vmap() -> None:
    model = nnx.merge(params_of.graphdef(TINY), params_of.init_params(TINY, 0))
    tokens = random_tokens((3, 11))
    whole = forward(model, tokens, positions_like(tokens))
    zeros = jnp.zeros((3, TINY.num_layers, 16, TINY.num_kv_heads, TINY.head_dim))
    cache = DenseCache(zeros, zeros, positions_like(tokens))
    step = jax.jit(jax.vmap(model))
    for start, end in ((0, 6), (6, 7), (7, 11)):
        cache = dataclasses.replace(cache, positions_T=positions_like(tokens)[:, start:end])
        hidden, cache = step(tokens[:, start:end], cache)
        np.testing.assert_allclose(hidden, whole[:, start:end], atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32() -> None:
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    params = params_of.init_params(config, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = random_tokens((2, 8))
    hidden = forward(nnx.merge(params_of.graphdef(config), params), tokens, positions_like(tokens))
    exact = forward(nnx.merge(params_of.graphdef(TINY), params), tokens, positions_like(tokens))
    assert hidden.dtype == jnp.bfloat16
    assert nnx.merge(params_of.graphdef(config), params).logits(hidden).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_products_with_the_head(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    params = params_of.init_params(config, 0)
    model = nnx.merge(params_of.graphdef(config), params)
    assert ("head" in params) is not tied
    hidden = jax.random.normal(jax.random.key(1), (4, config.embed_dim))
    head_DV = params["embedding"][...].T if tied else params["head"][...]
    np.testing.assert_allclose(model.logits(hidden), hidden @ head_DV, atol=1e-5)


def test_init_is_reproducible_and_scaled() -> None:
    config = dataclasses.replace(TINY, embed_dim=128, mlp_dim=256)
    params, again, other = (params_of.init_params(config, seed) for seed in (0, 0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    block = params["blocks"][1]
    assert not np.array_equal(block["mlp"]["up"][...], other["blocks"][1]["mlp"]["up"][...])
    assert not np.array_equal(block["mlp"]["up"][...], params["blocks"][0]["mlp"]["up"][...])
    np.testing.assert_allclose(jnp.std(block["mlp"]["up"][...]), 0.02, rtol=0.05)
    np.testing.assert_allclose(jnp.std(block["mlp"]["down"][...]), 0.02 / 2, rtol=0.05)


def test_graphdef_and_params_fit_together() -> None:
    params = params_of.init_params(TINY, 0)
    graphdef, split = nnx.split(nnx.merge(params_of.graphdef(TINY), params))
    assert graphdef == params_of.graphdef(TINY)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    abstract = params_of.abstract_params(TINY)
    assert jax.tree.structure(split) == jax.tree.structure(abstract) == jax.tree.structure(shapes)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(shapes)


def test_every_axis_has_a_logical_name() -> None:
    params = params_of.abstract_params(dataclasses.replace(TINY, tie_embeddings=False))
    sizes = {"embed": 24, "mlp": 40, "heads": 24, "kv_heads": 12, "vocab": 61, None: 24}
    for leaf, axes in zip(jax.tree.leaves(params), jax.tree.leaves(params_of.logical_axes(params)), strict=True):
        assert leaf.shape == tuple(sizes[name] for name in axes)


def test_the_papers_model_has_its_size() -> None:
    count = params_of.num_params(PAPER)
    assert count.non_embedding == 18 * (4 * 1024**2 + 3 * 1024 * 2752 + 2 * 1024) + 1024  # 228M
    assert count.embedding == 2 * 32000 * 1024
    assert round(count.non_embedding / 1e6) == 228
    assert round(count.total / 1e6) == 293
    tied = dataclasses.replace(PAPER, tie_embeddings=True)
    assert params_of.num_params(tied).embedding == 32000 * 1024
    assert params_of.num_params(TINY).total == sum(
        leaf.size for leaf in jax.tree.leaves(params_of.init_params(TINY, 0))
    )


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"segment_ids \(4,\) and positions \(5,\) must have one shape"):
        training_rows(TINY, jnp.arange(5), jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match=r"reach \(4,\) and positions \(5,\) must have one shape"):
        training_rows(TINY, jnp.arange(5), jnp.ones(5, jnp.int32), reach=jnp.ones(4, jnp.int32))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_layers_that_are_recomputed_run_under_a_map_that_closes_over_the_weights(remat: str) -> None:
    """As validation's microbatches do."""
    params, tokens = params_of.init_params(TINY, 0), random_tokens((2, 1, 7))

    def mapped(config: ModelConfig) -> jax.Array:
        def hidden(params: Any, row: jax.Array) -> jax.Array:
            return nnx.merge(params_of.graphdef(config), params)(row, training_rows(config, positions_like(row)))[0]

        return jax.jit(lambda params: jax.lax.map(lambda row: hidden(params, row), tokens))(params)

    recomputed = mapped(dataclasses.replace(TINY, remat=remat))
    np.testing.assert_allclose(recomputed, mapped(TINY), atol=1e-6)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("qwen2", "float32")])
def test_a_loop_over_layers_computes_what_unrolled_ones_do_and_is_one_layer_to_a_compiler(family, dtype) -> None:
    tokens, looping = random_tokens((2, 9)), dataclasses.replace(XLA, loops=True)

    def gradients(layers: int, ops: Ops) -> tuple[Any, Any]:
        config = dataclasses.replace(TINY, family=family, num_layers=layers, compute_dtype=dtype, remat="full")
        params = jax.tree.map(lambda x: 3 * x + 0.01, params_of.init_params(config, 0))

        def loss(params: Any) -> jax.Array:
            model = nnx.merge(params_of.graphdef(config, ops), params)
            hidden, _ = model(tokens, training_rows(config, positions_like(tokens)))
            return jnp.mean(jax.nn.logsumexp(model.logits(hidden), axis=-1))

        return jax.jit(jax.value_and_grad(loss)), params

    programs = gradients(2, looping), gradients(3, looping), gradients(3, XLA)
    products = [str(step.trace(params).jaxpr).count("dot_general") for step, params in programs]
    assert products[0] == products[1] < products[2]
    (loss, grads), (expected_loss, expected) = (step(params) for step, params in programs[1:])
    error = 1e-5 if dtype == "float32" else 5e-2
    np.testing.assert_allclose(loss, expected_loss, rtol=error)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(got - wanted) < error * np.linalg.norm(wanted)
