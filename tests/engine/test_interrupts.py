"""After an exception at any point the engine works as a new one: no page is lost, no donated buffer is used."""

import itertools
import signal

import pytest

from apr_jax.engine.threads import Decode, Join, Open, Spawn
from apr_jax.model import held_weights
from tests.engine.helpers import assert_same_bits, keyed, make_engine, make_params, plain, prompt, searching


def forking():
    """Children that share their parent's last page, which is copied for them."""
    thread = yield Open(prompt(3, 14))
    yield Decode(thread, (), max_tokens=4)

    def child(token):
        own = yield Open([token], fork_of=thread)
        return (yield Decode(own, (7,)))

    return (yield Join((yield Spawn([child(5), child(6)]))))


def programs():
    return keyed([searching(1, depth=1), plain(1, length=40), plain(1, length=40), forking()])


class Interrupted:
    """A step that does its work, the `count`-th time never to return: its donated arguments are gone."""

    def __init__(self, step, count):
        self.step, self.left = step, count

    def __call__(self, *arguments):
        result = self.step(*arguments)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return result

    def __getattr__(self, name):
        return getattr(self.step, name)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def expected():
    return make_engine().run(programs(), seed=3, temperature=1.0)


def assert_as_new(engine, expected):
    engine._scheduler.check()
    assert engine._scheduler.num_running == 0
    assert all(allocator.num_held == 0 for allocator in engine._scheduler.cache.allocators)
    for ours, theirs in zip(engine.run(programs(), seed=3, temperature=1.0), expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("step", "count"), [("decode", 1), ("decode", 3), ("prefill", 1), ("prefill", 2), ("copy_pages", 1)]
)
def test_an_interrupt_between_a_donating_call_and_its_result(engine, expected, monkeypatch, step, count):
    monkeypatch.setattr(engine._steps, step, Interrupted(getattr(engine._steps, step), count))
    with pytest.raises(KeyboardInterrupt):
        engine.run(programs(), seed=3, temperature=1.0)
    monkeypatch.undo()
    assert_as_new(engine, expected)


@pytest.mark.parametrize("step", ["decode", "prefill", "copy_pages"])
def test_an_interrupted_warm_up(engine, expected, monkeypatch, step):
    monkeypatch.setattr(engine._steps, step, Interrupted(getattr(engine._steps, step), 1))
    with pytest.raises(KeyboardInterrupt):
        engine.warm_up()
    monkeypatch.undo()
    assert_as_new(engine, expected)


@pytest.mark.parametrize("visit", [1, 2, 4])
def test_an_exception_after_a_visit(engine, expected, visit):
    visits = itertools.count(1)

    def stop(_):
        if next(visits) == visit:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        engine.run(programs(), seed=3, temperature=1.0, on_progress=stop)
    assert_as_new(engine, expected)


def test_an_interrupt_while_the_engine_starts_anew(engine, expected, monkeypatch):
    """The second Ctrl-C comes while the first is dealt with: the next run starts anew."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_make_pages", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.run(programs(), seed=3, temperature=1.0, on_progress=interrupt)
    monkeypatch.undo()
    for ours, theirs in zip(engine.run(programs(), seed=3, temperature=1.0), expected, strict=True):
        assert_same_bits(ours, theirs)


def test_new_weights_whose_placing_was_interrupted_leave_no_old_prefix(engine, expected, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    engine.run(programs(), seed=3, temperature=1.0)
    monkeypatch.setattr(engine, "_place", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.set_params(make_params(seed=1))
    monkeypatch.undo()
    assert not engine._scheduler.cache.allocators[0]._published
    assert_as_new(engine, expected)


def test_an_engine_that_lost_its_weights_on_the_way_takes_them_again(engine, expected, monkeypatch):
    jitted, calls = held_weights._jitted, iter(range(100))

    def interrupted(*how):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return jitted(*how)

    monkeypatch.setattr(held_weights, "_jitted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.set_params(make_params(seed=1))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"no weights, for new ones were interrupted .*; set them again"):
        engine.run(programs(), seed=3, temperature=1.0)
    engine.set_params(make_params())
    assert_as_new(engine, expected)


@pytest.fixture(scope="module")
def engine_seconds(engine):
    """The length of a run that compiles nothing."""
    for _ in range(2):
        engine.run(programs(), seed=3, temperature=1.0)
    return engine.stats.seconds


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a garbage collection
def test_signals_at_any_moment(engine, engine_seconds, expected):
    """Interrupts by a timer, from the run's first moments to its last ones."""

    def interrupt(*_):
        raise KeyboardInterrupt

    engine.run(programs(), seed=3, temperature=1.0)
    before, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for turn in range(1, 25):
            try:
                signal.setitimer(signal.ITIMER_REAL, engine_seconds * turn / 24)
                engine.run(programs(), seed=3, temperature=1.0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 3
    for ours, theirs in zip(engine.run(programs(), seed=3, temperature=1.0), expected, strict=True):
        assert_same_bits(ours, theirs)
