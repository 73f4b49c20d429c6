"""Pytrees as they lie on disk: arrays by their dotted path, so that no file depends on a Python class."""

from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves by path: `{"layers.0.attention.q": array}`."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(like: Any, flat: dict[str, Any]) -> Any:
    """Return a tree of the structure of `like` with the leaves of `flat`. Raises KeyError for a path it lacks."""
    paths = jax.tree_util.tree_leaves_with_path(like)
    return jax.tree.unflatten(jax.tree.structure(like), [flat[_name(path)] for path, _ in paths])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
