"""The training state on a mesh."""

import jax

from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, small_config

CONFIG = small_config(**{"sft.optimizer.name": "muon"})


def test_moments_lie_like_their_parameter():
    config = on_mesh(CONFIG, data=1, fsdp=4)
    optimizer = make_optimizer(config.sft.optimizer, 10)
    state = create_state(make_mesh(config.mesh), config.model, optimizer)
    split = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    assert split
    moments = [x for x in jax.tree.leaves(state.opt_state) if not x.sharding.is_fully_replicated]
    adam_tables = 1  # Adam keeps two moments of the embedding, Muon one of each matrix
    assert len(moments) == len(split) + adam_tables
