"""docs/meshes.md describes the sharding; here it is compared with the shardings that the code makes."""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.config import MeshConfig
from apr_jax.config_dict import from_config_dict
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.sharded import SHARDED
from apr_jax.kernels import for_training
from apr_jax.model.params import graphdef, init_params
from apr_jax.model.placement import place_params
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.scorer import to_mesh
from apr_jax.train.state import abstract_state
from configs.grpo import get_config
from tests.train.small import random_rows, small_config

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "meshes.md"
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def _table(num_columns):
    """The rows of the table with so many columns, {name: the rest of its row}, without its two rows of heading."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").replace("\\*", "*").split("|")] for line in lines]
    chosen = [row for row in rows if len(row) == num_columns][2:]
    return {name.strip(): row[1:] for row in chosen for name in (row[0].split(",") if num_columns == 4 else row[:1])}


def _text(spec, num_axes):
    """A PartitionSpec as the table has it."""
    axes = [*spec, *[None] * (num_axes - len(spec))]
    return ", ".join("-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in axes)


def test_weights_and_moments():
    config = from_config_dict(get_config("paper"))
    optimizer = make_optimizer(config.sft.optimizer, 10)
    state = abstract_state(make_mesh(MESH), config.model, optimizer)

    def specs(tree):
        found = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            parts = [part for part in name.split(".") if part not in ("blocks", "mu", "nu") and not part.isdigit()]
            if leaf.ndim:
                found.setdefault(".".join(parts), set()).add((leaf.ndim, _text(leaf.sharding.spec, leaf.ndim)))
        return found

    table = _table(4)
    expected = [{name: {(len(row[0].split(",")), row[column])} for name, row in table.items()} for column in (1, 2)]
    assert specs(state.params) == expected[0]
    assert specs(state.opt_state[1]) == expected[1]


def test_rows_lanes_and_pages():
    config, mesh = from_config_dict(get_config("paper")), make_mesh(MESH)
    table = {name: row for name, row in _table(3).items() if not name.startswith("hidden")}
    plan = EnginePlan.of(config.model, config.engine, mesh)
    pages = jax.eval_shape(plan.pages).keys[0]
    shards, _, heads, *_ = pages.shape
    assert (shards, heads) == (2, config.model.num_kv_heads)
    rows = to_mesh({name: x[:4] for name, x in random_rows(64, 32, 40).items()}, mesh)
    rows_sharding = rows["tokens"].sharding
    assert isinstance(rows_sharding, jax.sharding.NamedSharding)
    actual = {
        "training rows (tokens, targets, weights, ..)": _text(rows_sharding.spec, 2),
        "pages of the KV cache": _text(plan.cache_sharding.spec, pages.ndim),
        "lanes (tokens, page tables, ..)": _text(SHARDED, 2),
    }
    assert actual == {name: split for name, (_, split) in table.items()}
    assert len(table["pages of the KV cache"][0].split(",")) == pages.ndim


def test_hidden_states():
    [split] = [row[1] for name, row in _table(3).items() if name.startswith("hidden")]
    model = small_config(**{"model.num_kv_heads": 2}).model
    mesh, structure = make_mesh(MESH), graphdef(model, for_training(model, "cpu").ops)
    params = place_params(init_params(model, 0), mesh, model)
    rows = to_mesh({name: x[:4] for name, x in random_rows(64, 32, 40).items()}, mesh)

    @jax.jit
    def hidden_BTD(params, rows):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as train.batches.make_scorer
            return nnx.merge(structure, params)(
                rows["tokens"], training_rows(model, rows["positions"], rows["segment_ids"])
            )[0]

    out = hidden_BTD(params, rows)
    assert bool(jnp.isfinite(out).all())
    assert _text(out.sharding.spec, 3) == split
