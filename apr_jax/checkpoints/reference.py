"""The whole policies that a phase starts from, which a run saves once.

    WORKDIR/checkpoints/reference   GRPO's, to which its KL term refers
    WORKDIR/checkpoints/base        SFT's, where it trains adapters (model/lora.py)

Adapters of GRPO belong to the reference policy.
"""

import pathlib
from typing import Any, Literal

import orbax.checkpoint as ocp

from apr_jax.checkpoints.integrity import SUMS, CheckpointError, check_files, remove, set_aside, write_sums
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.files import is_refusal, naming
from apr_jax.parallel import hosts
from apr_jax.paths import is_remote

Name = Literal["reference", "base"]
_SOURCES: dict[Name, str] = {"reference": "SFT's last checkpoint or --checkpoint", "base": "--start"}


def save_reference(workdir: pathlib.Path, params: Any, name: Name = "reference") -> None:
    """Save a phase's first policy with the checksums of its files, unless there is one."""
    path = _folder(workdir, name)
    if _is_whole(path):
        return
    new = path if is_remote(path) else path.with_name(f"{name}.new")  # a store cannot rename
    with naming(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(new, flatten(params), force=True)

    def complete() -> None:
        write_sums(new)
        if new != path:
            new.rename(path)

    hosts.from_first(complete)


def has_reference(workdir: pathlib.Path) -> bool:
    """Return True once the reference policy is saved: SFT is done, or a policy was given."""
    return _is_whole(_folder(workdir))


def reference_damage(workdir: pathlib.Path) -> str:
    """Return the damage to the reference policy's files, "" where there is none."""

    def check() -> str:
        try:
            check_files(_folder(workdir))
        except CheckpointError as error:
            return str(error)
        return ""

    return hosts.from_first(check)


def set_reference_aside(workdir: pathlib.Path, damage: str) -> None:
    """Move a damaged reference policy out of the way, so that it is made again."""
    path = _folder(workdir)
    problem = f"{damage}. It is made again."
    hosts.from_first(lambda: set_aside(path, path.parent / "unusable" / "reference", problem))


def load_reference(workdir: pathlib.Path, abstract: Any, name: Name = "reference") -> Any:
    """Load a phase's first policy.

    Args:
      abstract: a ShapeDtypeStruct with a sharding for each array.
    Raises:
      FileNotFoundError: none was saved.
      CheckpointError: it cannot be read.
    """
    path = _folder(workdir, name)
    if not _is_whole(path):
        raise FileNotFoundError(f"no {name} policy at {path}")
    try:
        with naming(path), ocp.StandardCheckpointer() as checkpointer:
            return unflatten(abstract, checkpointer.restore(path, flatten(abstract)))
    except Exception as error:  # as in `Checkpoints.restore`
        if is_refusal(error):
            raise
        raise CheckpointError(
            f"the {name} policy {path} cannot be read. Move it away, and it is made again from "
            f"{_SOURCES[name]}. ({error})"
        ) from error


def forget_reference(workdir: pathlib.Path, name: Name = "reference") -> None:
    """Remove a phase's first policy, so that it is made anew. A crash never leaves half of one."""
    path = _folder(workdir, name)

    def forget() -> None:
        if path.exists():
            doomed = path if is_remote(path) else path.rename(path.with_name(f"{name}.removed"))
            remove(doomed)

    hosts.from_first(forget)  # it is gone before another host looks


def _is_whole(folder: pathlib.Path) -> bool:
    """Return True if a policy was saved to its end; its sums are the last of it."""
    return (folder / SUMS).exists() if is_remote(folder) else folder.exists()


def _folder(workdir: pathlib.Path, name: Name = "reference") -> pathlib.Path:
    return (workdir / "checkpoints" / name).absolute()
