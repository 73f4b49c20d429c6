"""The memory plan counts what the engine then holds, and refuses what cannot fit."""

import dataclasses

import jax
import pytest

from apr_jax.config import ConfigError
from tests.engine.helpers import make_engine, make_mesh


def local_bytes(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 2)])
def test_the_plan_is_what_a_device_holds(data, tensor):
    engine = make_engine(make_mesh(data, tensor), pages=26)
    plan = engine.memory
    assert plan.pages == local_bytes(engine._pages)
    assert plan.weights == local_bytes(engine._params)
    assert plan.total == plan.weights + plan.pages + plan.activations + plan.beside < plan.limit


def test_too_large_is_refused_with_the_numbers_before_anything_is_allocated():
    with pytest.raises(ConfigError, match=r"does not fit a device: .* GB a device of .*engine.pages"):
        make_engine(pages=2_000_000_000)


def test_the_limit_is_checked(monkeypatch):
    plan = make_engine().memory
    dataclasses.replace(plan, limit=plan.total).check()
    dataclasses.replace(plan, limit=None).check()
    with pytest.raises(ConfigError, match="weights"):
        dataclasses.replace(plan, limit=plan.total - 1).check()
