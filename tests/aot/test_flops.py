"""FLOPs of traced programs, against hand counts and against XLA's own where it has no loop."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from apr_jax.aot.flops import count_flops
from apr_jax.config import MeshConfig
from apr_jax.kernels.tpu.splash import splash_attention
from apr_jax.parallel.mesh import make_mesh

A, B = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
PRODUCT = 2 * 8 * 16 * 4


def flops(function, *arguments):
    return count_flops(jax.jit(function).trace(*arguments).jaxpr)


def test_a_product_and_its_gradient():
    assert flops(jnp.matmul, A, B) == PRODUCT
    assert flops(jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), (0, 1)), A, B) == 3 * PRODUCT


def test_loops_count_as_often_as_they_run_and_remat_again():
    def scanned(a, b):
        return jax.lax.scan(lambda carry, _: (carry + jnp.sum(a @ b), None), jnp.zeros(()), length=5)[0]

    assert flops(scanned, A, B) == 5 * PRODUCT

    def plain(a, b):
        return jnp.sum(jnp.sin(jnp.sin(a @ b) @ b.T))

    assert flops(jax.grad(jax.checkpoint(plain)), A, B) > flops(jax.grad(plain), A, B)
    assert flops(
        lambda a, b: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, a @ b), (0, a @ b)), A, B
    ) == (2 * PRODUCT)


def test_a_condition_counts_its_longer_branch():
    def branches(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ (b.T @ b))

    assert flops(branches, A, B) == PRODUCT + 2 * 4 * 16 * 4 + 2 * 8 * 4 * 4


def test_what_runs_on_every_shard_counts_for_all():
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    assert flops(split, A, B) == 2 * PRODUCT  # over "tensor" each computes the same


def test_a_splash_kernel_counts_the_blocks_that_causality_leaves():
    heads = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    square = 2 * 2 * 4 * 1024 * 1024 * 64

    def attend(q, k, v):
        return splash_attention(q, k, v, jnp.ones(q.shape[:2], jnp.int32))

    assert flops(attend, heads, heads, heads) == 2 * square * 3 // 4  # blocks of 512: three of four

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v).astype(jnp.float32))

    assert flops(jax.grad(loss, (0, 1, 2)), heads, heads, heads) >= (2 + 7) * square * 3 // 4


def test_a_training_pass_is_six_or_eight_flops_a_weight_and_token():
    from apr_jax.config import MeshConfig
    from apr_jax.model.params import abstract_params, num_params
    from apr_jax.parallel.mesh import make_mesh
    from apr_jax.train.scorer import make_scorer
    from tests.train.small import small_config

    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    model = dataclasses.replace(small_config().model, remat="none", attention="xla")
    rows = {
        name: jax.ShapeDtypeStruct((2, 64), jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")
    }

    def traced(model):
        scorer = make_scorer(model, mesh, jax.nn.log_softmax)
        return flops(jax.grad(lambda p, b: jnp.sum(scorer(p, b).logprob_BT)), abstract_params(model), rows)

    weights = num_params(model).non_embedding + model.embed_dim * model.vocab_size
    plain, remat = traced(model), traced(dataclasses.replace(model, remat="full"))
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * 64 * 128
    assert 6 * weights * 128 * 0.95 < plain < 6 * weights * 128 + 2 * attention
    assert 1.1 < remat / plain < 4 / 3 + 0.05
