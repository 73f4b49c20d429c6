"""Checkpoints: everything comes back, on any mesh; another configuration is refused by name."""

import dataclasses
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.checkpoints.policy import load_policy
from apr_jax.checkpoints.reference import has_reference, load_reference, save_reference
from apr_jax.checkpoints.resume_check import check_same
from apr_jax.config import ConfigError
from apr_jax.config_dict import to_dict
from apr_jax.model.params import init_params
from apr_jax.model.placement import abstract_params_on, place_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.parallel.mesh import make_mesh, replicated
from tests.train.small import on_mesh, small_config

CONFIG = small_config(**{"sft.optimizer.name": "muon"})


def _trees(config=CONFIG, seed=0):
    """A policy and some other arrays, nested as an optimiser's state is."""
    mesh = make_mesh(config.mesh)
    params = place_params(init_params(config.model, seed), mesh, config.model)
    noise = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), params)
    return {"policy": params, "optimizer": (jax.device_put(jnp.asarray(3), replicated(mesh)), [{"moments": noise}])}


def _abstract(config=CONFIG):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _trees(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    trees = _trees()
    with Checkpoints(workdir, "sft", CONFIG) as checkpoints:
        checkpoints.save(3, trees, {"next": [1, 2], "name": "x"}, note=2)
    save_reference(workdir, trees["policy"])
    return workdir, trees


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}], ids=["one device", "another mesh"])
def test_all_of_it_comes_back(saved, mesh):
    workdir, trees = saved
    config = on_mesh(CONFIG, **mesh)
    with Checkpoints(workdir, "sft", config) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored, position, meta = checkpoints.restore(_abstract(config))
    assert meta["note"] == 2
    assert position == {"next": [1, 2], "name": "x"}
    assert jax.tree.structure(restored) == jax.tree.structure(trees)
    jax.tree.map(np.testing.assert_array_equal, restored, trees)
    leaf = jax.tree.leaves(restored["policy"])[-1]
    assert dict(leaf.sharding.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} | mesh


def test_another_configuration_is_refused_by_name(saved):
    workdir, _ = saved
    other = dataclasses.replace(
        CONFIG, seed=7, sft=dataclasses.replace(CONFIG.sft, rows_per_step=8), name="free", evaluation=CONFIG.evaluation
    )
    with Checkpoints(workdir, "sft", other) as checkpoints, pytest.raises(ConfigError) as error:
        checkpoints.settle()
    assert "seed: 0 saved, 7 now" in str(error.value)
    assert "sft.rows_per_step: 4 saved, 8 now" in str(error.value)
    assert "name" not in str(error.value).replace("--workdir", "").split("configuration:")[1]


def test_reference_is_saved_once(saved):
    workdir, trees = saved
    assert has_reference(workdir)
    save_reference(workdir, init_params(CONFIG.model, 5))
    reference = load_reference(workdir, abstract_params_on(make_mesh(CONFIG.mesh), CONFIG.model))
    jax.tree.map(np.testing.assert_array_equal, reference, trees["policy"])


@pytest.mark.parametrize("folder", [".", "checkpoints", "checkpoints/sft", "checkpoints/sft/3"])
def test_policy_loads_from_any_of_its_folders(saved, folder):
    workdir, trees = saved
    model, params, config = load_policy(workdir / folder)
    assert model == CONFIG.model
    assert config == to_dict(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params, trees["policy"])


def test_policy_loads_from_hugging_face_and_nothing_else(saved, tmp_path):
    _, trees = saved
    save_hf(tmp_path / "hf", CONFIG.model, trees["policy"], None)
    model, params, config = load_policy(tmp_path / "hf")
    assert config is None
    assert model.embed_dim == CONFIG.model.embed_dim
    jax.tree.map(np.testing.assert_array_equal, params, trees["policy"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a run folder"):
        load_policy(tmp_path / "empty")


def test_an_incomplete_checkpoint_is_not_seen(saved, tmp_path):
    workdir, _ = saved
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "checkpoints" / "sft" / "4.orbax-checkpoint-tmp-123").mkdir()
    with Checkpoints(copy, "sft", CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert load_policy(copy)[0] == CONFIG.model


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3 that differ, and the trees of each."""
    workdir, trees = tmp_path_factory.mktemp("three"), {}
    config = _keeping(3)
    with Checkpoints(workdir, "sft", config) as checkpoints:
        for step in (1, 2, 3):
            trees[step] = _trees(seed=step)
            checkpoints.save(step, trees[step], {"step": step})
    return workdir, trees


def _keeping(number):
    return dataclasses.replace(CONFIG, faults=dataclasses.replace(CONFIG.faults, keep_checkpoints=number))


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _cut_short(folder):
    path = _largest(folder / "policy")
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(folder):
    path = _largest(folder / "policy")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_short, r"has \d+ of \d+ bytes"),
        (_flip_a_bit, "another checksum"),
        (lambda folder: (folder / "meta" / "metadata").unlink(), "meta/metadata is missing"),
        (lambda folder: shutil.rmtree(folder / "optimizer"), "optimizer/.* is missing"),
        (lambda folder: (folder / "sums.json").write_text("{"), "sums.json is damaged"),
    ],
    ids=["cut short", "a bit flipped", "without metadata", "without optimizer", "sums damaged"],
)
def test_a_damaged_checkpoint_gives_way_to_the_last_good_one(three, tmp_path, capsys, damage, message):
    workdir, trees = three
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    damage(copy / "checkpoints" / "sft" / "3")
    with pytest.raises(CheckpointError, match=f"3 is damaged: .*{message}"):
        load_policy(copy)
    with Checkpoints(copy, "sft", CONFIG) as checkpoints:
        assert checkpoints.settle() == checkpoints.latest_step() == 2
        restored, position, _ = checkpoints.restore(_abstract())
        assert position == {"step": 2}
        jax.tree.map(np.testing.assert_array_equal, restored, trees[2])
        checkpoints.save(3, trees[3], {"step": 3})  # in its place
    assert (copy / "checkpoints" / "unusable" / "sft-3").is_dir()
    assert re.search(f"cannot be used and is now .*unusable/sft-3: .*{message}", capsys.readouterr().err)
    with Checkpoints(copy, "sft", CONFIG) as checkpoints:
        assert checkpoints.settle() == 3


def test_another_runs_checkpoint_gives_way_and_without_a_good_one_the_run_is_refused(three, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(three[0], copy)
    folder = copy / "checkpoints" / "sft"
    other = dataclasses.replace(CONFIG, seed=7)
    with Checkpoints(tmp_path / "other", "sft", other) as checkpoints:
        checkpoints.save(9, _trees(), {})
    shutil.copytree(tmp_path / "other" / "checkpoints" / "sft" / "9", folder / "9")
    with Checkpoints(copy, "sft", CONFIG) as checkpoints:
        assert checkpoints.settle() == 3
    assert "seed: 7 saved, 0 now" in capsys.readouterr().err
    for step in (1, 2, 3):
        _cut_short(folder / str(step))
    with Checkpoints(copy, "sft", CONFIG) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.settle()
    assert all(f"  {step}: " in str(error.value) for step in (1, 2, 3))
    assert (folder / "3").is_dir(), "nothing is moved when nothing can be used"


def test_what_is_saved_is_the_state_at_that_time_though_training_goes_on_with_its_buffers(tmp_path):
    trees = _trees()
    expected = jax.tree.map(np.array, trees)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, "sft", CONFIG) as checkpoints:
        checkpoints.save(1, trees, {})
        jax.block_until_ready(step(trees))
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(_abstract()).trees, expected)


def test_the_newest_are_kept_and_the_best_by_validation_which_has_a_name(tmp_path):
    with Checkpoints(tmp_path, "sft", _keeping(2)) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.5], start=1):
            checkpoints.score(step, loss)
            checkpoints.save(step, _trees(seed=step), {})
    folder = tmp_path / "checkpoints" / "sft"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5", "best.json"]
    for place in (tmp_path, tmp_path / "checkpoints", folder):
        _, params, _ = load_policy(place / "best")
        jax.tree.map(np.testing.assert_array_equal, params, init_params(CONFIG.model, 2))
    with Checkpoints(tmp_path, "grpo", CONFIG) as checkpoints:
        for step, accuracy in enumerate([0.5, 0.5], start=7):  # GRPO's goes before SFT's, of equal ones the later
            checkpoints.save(step, _trees(seed=step), {})
            checkpoints.score(step, accuracy)
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "best")[1], init_params(CONFIG.model, 8))


def test_without_validation_there_is_no_best(three):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* has a validation score"):
        load_policy(three[0] / "best")


def test_a_decay_that_has_begun_fixes_the_length():
    optimizer = dataclasses.replace(CONFIG.sft.optimizer, schedule="trapezoid", decay_steps=4)
    then = dataclasses.replace(CONFIG, sft=dataclasses.replace(CONFIG.sft, optimizer=optimizer))
    longer = dataclasses.replace(then, sft=dataclasses.replace(then.sft, num_steps=20))
    meta = {"phase": "sft", "config": to_dict(then)}
    check_same({**meta, "step": 2}, to_dict(longer), "sft", "HERE")
    with pytest.raises(ConfigError, match=r"sft.num_steps cannot change: 3 steps are done"):
        check_same({**meta, "step": 3}, to_dict(longer), "sft", "HERE")


@pytest.mark.parametrize(
    ("schedule", "num_steps", "message"),
    [
        ("constant", 20, None),
        ("constant", 3, None),
        ("constant", 2, r"sft.num_steps=2 is less than the 3 steps that are done"),
        ("cosine", 20, r"sft.num_steps cannot change: the cosine schedule ends there"),
        ("trapezoid", 20, None),
        ("trapezoid", 5, None),
        ("trapezoid", 4, r"sft.num_steps cannot change: 3 steps are done, and the learning rate falls from step 2"),
    ],
)
def test_a_run_can_be_made_longer_where_no_step_that_is_done_would_change(schedule, num_steps, message):
    optimizer = dataclasses.replace(CONFIG.sft.optimizer, schedule=schedule, decay_steps=2)
    then = dataclasses.replace(CONFIG, sft=dataclasses.replace(CONFIG.sft, optimizer=optimizer))
    now = dataclasses.replace(then, sft=dataclasses.replace(then.sft, num_steps=num_steps))
    current = to_dict(now)
    meta = {"phase": "sft", "step": 3, "config": to_dict(then)}
    if message is None:
        check_same(meta, current, "sft", "HERE")
    else:
        with pytest.raises(ConfigError, match=f"HERE was made .*(?s:.*)sft.num_steps: 6 saved(?s:.*){message}"):
            check_same(meta, current, "sft", "HERE")
