"""One engine at a time."""

import gc
import weakref

import pytest

from apr_jax.reasoning.policy_engine import EngineHolder


class Engine:
    def __init__(self):
        self.weights, self.is_warm = [], False

    def warm_up(self):
        self.is_warm = True
        return 0.0

    def set_params(self, params):
        self.weights.append(params)


def test_an_engine_is_made_once_warm_and_given_weights_when_asked():
    holder: EngineHolder[Engine] = EngineHolder()
    assert holder.made_for is None
    engine = holder.get("this", Engine, {"new": 1})
    assert (engine.is_warm, engine.weights, holder.made_for) == (True, [], "this")  # `make` gave it its weights
    assert holder.get("this", Engine) is engine
    assert engine.weights == []
    assert holder.get("this", Engine, {"newer": 2}) is engine
    assert engine.weights == [{"newer": 2}]


def test_the_present_engine_is_gone_before_the_next_is_made():
    holder: EngineHolder[Engine] = EngineHolder()
    first = weakref.ref(holder.get("this", Engine))
    alive = []

    def make():
        gc.collect()
        alive.append(first() is not None)
        return Engine()

    holder.get("another", make)
    assert alive == [False]


def test_an_engine_that_could_not_be_made_leaves_none():
    holder: EngineHolder[Engine] = EngineHolder()

    class Broken(Engine):
        def warm_up(self):
            raise MemoryError

    holder.get("this", Engine)
    with pytest.raises(MemoryError):
        holder.get("another", Broken)
    assert holder.get("this", Engine).is_warm
