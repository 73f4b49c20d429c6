"""Every layout of the weights is the same model."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.model import llama, native
from apr_jax.model.decode_weights import choose_layout, layout_shardings, num_bytes, to_layout
from apr_jax.model.llama import WeightLayout
from tests.engine.helpers import MODEL, make_mesh

pytestmark = pytest.mark.heavy

ARRANGED = ("plain", "transposed", *(["panels", "paired_panels"] if native.is_available() else []))
LAYOUTS = [WeightLayout(*choices) for choices in itertools.product((False, True), ARRANGED, (False, True))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_do_not_depend_on_the_layout(layout, tied):
    config = dataclasses.replace(MODEL, tie_embeddings=tied)
    if paired := layout.matrices == "paired_panels":
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    params = llama.init_params(config, 0)
    tokens, positions = jnp.arange(12), jnp.arange(12)

    def logits(model):
        return model.logits(model(tokens, positions)[0])

    expected = logits(nnx.merge(llama.graphdef(config), params))
    model = nnx.merge(llama.graphdef(config, layout), to_layout(params, config, layout))
    np.testing.assert_allclose(logits(model), expected, atol=0.002 if paired else 1e-5)
    weights = nnx.merge(llama.graphdef(config), params).head_weight()
    np.testing.assert_array_equal(model.head_weight(), weights.astype(model.head_weight().dtype))


def test_matrices_are_in_the_compute_dtype_and_norms_in_float32():
    config = dataclasses.replace(MODEL, compute_dtype="bfloat16", tie_embeddings=True)
    layout = WeightLayout(fused=True, matrices="transposed", own_head=True)
    made = to_layout(llama.init_params(config, 0), config, layout)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made) if leaf.ndim > 1} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made) if leaf.ndim == 1} == {"float32"}
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(made)) - made["embedding"][...].nbytes
    assert num_bytes(config, layout) == read


def test_fused_matrices_are_never_split():
    assert choose_layout(MODEL, make_mesh()).fused
    mesh = make_mesh(data=2, tensor=2)
    layout = choose_layout(MODEL, mesh)
    assert not layout.fused
    assert choose_layout(MODEL, mesh, with_kernels=True) == layout
    transposed = dataclasses.replace(layout, matrices="transposed")
    for given in (layout, transposed):
        specs = layout_shardings(mesh, MODEL, given)
        down, gate = (specs["blocks"][0]["mlp"][name].get_value().spec for name in ("down", "gate"))
        assert (
            (down[0], gate[1]) == ("tensor", "tensor")
            if given.matrices == "plain"
            else (down[1], gate[0])
            == (
                "tensor",
                "tensor",
            )
        )
