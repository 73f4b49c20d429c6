"""What an updater says that it compiles is what it runs."""

import dataclasses

import jax

from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.rl.update import Updater
from apr_jax.train.state import create_state
from tests.train.small import on_mesh
from tests.train.test_grpo import CONFIG, TOKENIZER, made_up_rollouts


def _shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_programs_are_those_of_a_full_microbatch():
    grpo = dataclasses.replace(CONFIG.grpo, inner_updates=2, rows_per_microbatch=2)
    config = on_mesh(dataclasses.replace(CONFIG, grpo=grpo), data=2)
    mesh = make_mesh(config.mesh)
    updater = Updater(config, mesh, TOKENIZER)
    programs = updater.programs()
    assert set(programs) == {"grpo_gradients", "grpo_update", "grpo_reference"}
    state = create_state(mesh, config.model, updater.optimizer)
    (batch, *_) = updater.microbatches(updater.sequences(made_up_rollouts()))
    _, params, abstract, *_ = programs["grpo_gradients"][1]
    assert _shapes(abstract) == {name: _shapes(x) for name, x in batch.items() if name in abstract}
    assert _shapes(params) == _shapes(state.params)
    assert _shapes(programs["grpo_update"][1][0]) == _shapes(state)
    assert jax.eval_shape(programs["grpo_reference"][0], state.params, batch).shape == (2, grpo.row_len)
    for jitted, arguments in programs.values():
        jitted.lower(*arguments)
