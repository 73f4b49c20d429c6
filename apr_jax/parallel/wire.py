"""Values that hosts send each other, as JSON. Nothing that a peer sends can make this process execute anything."""

import base64
import dataclasses
import enum
import json
from collections.abc import Collection
from typing import Any

import numpy as np

_NUMBERS = "biuf"  # kinds of arrays: booleans, integers, floats


def encode(value: Any, types: Collection[type] = ()) -> bytes:
    """Return a value as bytes, which `decode` reads back.

    It may be made of None, booleans, numbers, strings, lists, tuples, dicts and arrays of numbers, and of the
    dataclasses and enumerations in `types`. Raises TypeError for anything else.
    """
    return json.dumps(_plain(value, frozenset(types))).encode()


def decode(data: bytes, types: Collection[type] = ()) -> Any:
    """Return the value that `encode` was given, with the same `types`. Raises ValueError for other bytes."""
    try:
        return _value(json.loads(data), {kind.__name__: kind for kind in types})
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"another host sent what this one cannot read ({error}); start all with the same code"
        ) from error


def _plain(value: Any, types: frozenset[type]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_plain(item, types) for item in value]
    if kind is tuple:
        return {"tuple": [_plain(item, types) for item in value]}
    if kind is dict:
        return {"dict": [[_plain(key, types), _plain(item, types)] for key, item in value.items()]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _NUMBERS:
        return {"array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if kind in types and isinstance(value, enum.Enum):
        return {"enum": [kind.__name__, value.value]}
    if kind in types and dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name), types) for field in dataclasses.fields(value)}
        return {"record": [kind.__name__, fields]}
    raise TypeError(f"hosts do not send each other a {kind.__name__}")


def _value(plain: Any, types: dict[str, type]) -> Any:
    if isinstance(plain, list):
        return [_value(item, types) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((tag, content),) = plain.items()
    if tag == "tuple":
        return tuple(_value(item, types) for item in content)
    if tag == "dict":
        return {_value(key, types): _value(item, types) for key, item in content}
    if tag == "array":
        dtype = np.dtype(content[0])
        if dtype.kind not in _NUMBERS:
            raise TypeError(f"an array of {dtype}")
        return np.frombuffer(base64.b64decode(content[2]), dtype).reshape(content[1]).copy()[()]
    if tag == "enum":
        return types[content[0]](content[1])
    if tag == "record":
        return types[content[0]](**{name: _value(item, types) for name, item in content[1].items()})
    raise KeyError(tag)
