"""Work in tokens and keys, and its FLOPs against those of the model's own traced forward."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from apr_jax.aot.flops import count_flops
from apr_jax.engine.work_counters import Work
from apr_jax.model.params import abstract_params, graphdef
from apr_jax.model.views.training import training_rows
from tests.train.small import small_config

MODEL = dataclasses.replace(small_config().model, attention="xla", num_layers=2, num_heads=4, num_kv_heads=2)


def test_a_token_attends_to_itself_and_all_before_it():
    assert Work().with_prefill(0, 4) == Work(prefilled=4, attended=1 + 2 + 3 + 4)
    assert Work().with_decode(4, 3) == Work(decoded=3, attended=5 + 6 + 7)
    assert Work().with_prefill(9, 0) == Work()
    total = Work().with_prefill(0, 4).with_decode(4, 3)
    assert total == Work(prefilled=4, decoded=3, attended=28) == Work().with_prefill(0, 4) + Work().with_decode(4, 3)
    assert total.computed == 7


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("length", "logits"), [(7, 0), (7, 7), (64, 1)])
def test_flops_are_those_of_the_models_own_forward(length, logits, tied):
    """The forward's attention is one dense square here (one block of queries): each token attends to all of them."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied)

    def forward(params, tokens):
        llama = nnx.merge(graphdef(model), params)
        hidden, _ = llama(tokens, training_rows(model, jnp.arange(length)))
        return llama.logits(hidden[:logits]) if logits else hidden

    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    traced = count_flops(jax.jit(forward).trace(abstract_params(model), tokens).jaxpr)
    work = Work(prefilled=length - logits, decoded=logits, attended=length * length)
    assert work.flops(model) == traced
