"""Messages between hosts come back as they were, and nothing but data of known kinds comes back at all."""

import dataclasses
import enum
import json
import os
import pickle

import numpy as np
import pytest

from apr_jax.engine.constraints import Masks
from apr_jax.engine.threads import Call, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.parallel.wire import decode, encode
from apr_jax.reasoning.base import Outcome, Sample
from apr_jax.train.hosted_engine import ROLLOUT_TYPES


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    colour: Colour


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        0.1,
        float("inf"),
        "é\u2028",
        [1, [2.5, ()]],
        ("only", (1, None)),
        {3: "three", "dict": {"tuple": (1,)}},
        Point(1, Colour.RED),
        [Colour.RED],
    ],
)
def test_values_come_back_as_they_were(value):
    back = decode(encode(value, [Point, Colour]), [Point, Colour])
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", ["int32", "float32", "uint8", "bool", "float64", "int8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_arrays_come_back_with_their_type_and_shape(dtype, shape):
    value = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    back = decode(encode(value))
    assert back.dtype == value.dtype
    np.testing.assert_array_equal(back, value)


def test_rollouts_come_back_as_they_were():
    stop = Stop(StopReason.TOKEN, 7)
    masks = Masks(np.zeros(2, np.int8), np.full((2, 3), -1, np.int32))
    call = Call((0, 1), np.arange(3, dtype=np.int32), np.ones(2, np.int32), np.zeros(2, np.float32), stop, 3, 0.1, 2.0)
    sample = Sample(answer=None, status="truncated", reason="max_steps", mean_logprob=-0.5)
    outcome = Outcome(answer="3 + 4", status="answered", reason="", child_paths=("a",), samples=(sample,))
    calls = (call, dataclasses.replace(call, masks=masks))
    rollout = Rollout(RolloutKey(3, 1), outcome, calls, 5, 2.5, Work(1, 2, 3))
    assert repr(decode(encode(rollout, ROLLOUT_TYPES), ROLLOUT_TYPES)) == repr(rollout)


@pytest.mark.parametrize(
    "value", [object(), os.system, Point, Point(1, Colour.RED), {1, 2}, b"x", np.array([object()])]
)
def test_nothing_else_is_sent(value):
    with pytest.raises(TypeError):
        encode(value)


class _Executes:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(_Executes()),
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"record": ["Popen", {"args": "true"}]}',
        b'{"record": ["Point", {"y": 1}]}',
        b'{"enum": ["Colour", "blue"]}',
        b'{"enum": ["system", "true"]}',
        json.dumps({"array": ["|O", [1], ""]}).encode(),
        json.dumps({"array": ["<i4", [7], "AAAA"]}).encode(),
        b'{"tuple": [1], "dict": []}',
        b"{}",
        b'{"what": 1}',
    ],
)
def test_other_bytes_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):  # noqa: PT011 (JSON's own error too)
        decode(data, [Point, Colour])
    assert not list(tmp_path.iterdir())
