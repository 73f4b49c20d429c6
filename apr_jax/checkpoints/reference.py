"""The reference policy: what GRPO starts from and its KL term refers to. A run saves it once."""

import pathlib
import shutil
from typing import Any

import orbax.checkpoint as ocp

from apr_jax.checkpoints.integrity import CheckpointError, check_files, set_aside, write_sums
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.files import is_refusal, naming
from apr_jax.parallel import hosts


def save_reference(workdir: pathlib.Path, params: Any) -> None:
    """Save the reference policy with the checksums of its files, unless there is one."""
    path = _folder(workdir)
    if path.exists():
        return
    new = path.with_name("reference.new")
    with naming(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(new, flatten(params), force=True)

    def complete() -> None:
        write_sums(new)
        new.rename(path)

    hosts.from_first(complete)


def has_reference(workdir: pathlib.Path) -> bool:
    """Return True once the reference policy is saved: SFT is done, or a policy was given."""
    return _folder(workdir).exists()


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


def load_reference(workdir: pathlib.Path, abstract: Any) -> Any:
    """Load the reference policy.

    Args:
      abstract: a ShapeDtypeStruct with a sharding for each array.
    Raises:
      FileNotFoundError: none was saved.
      CheckpointError: it cannot be read.
    """
    path = _folder(workdir)
    if not path.exists():
        raise FileNotFoundError(f"no reference policy at {path}")
    try:
        with naming(path), ocp.StandardCheckpointer() as checkpointer:
            return unflatten(abstract, checkpointer.restore(path, flatten(abstract)))
    except Exception as error:  # as in `Checkpoints.restore`
        if is_refusal(error):
            raise
        raise CheckpointError(
            f"the reference policy {path} cannot be read. Move it away, and it is made again from SFT's last "
            f"checkpoint or --checkpoint. ({error})"
        ) from error


def forget_reference(workdir: pathlib.Path) -> None:
    """Remove the reference policy, so that it is made anew. A crash never leaves half of one."""
    path = _folder(workdir)

    def remove() -> None:
        if path.exists():
            doomed = path.with_name("reference.removed")
            path.rename(doomed)
            shutil.rmtree(doomed)

    hosts.from_first(remove)  # it is gone before another host looks


def _folder(workdir: pathlib.Path) -> pathlib.Path:
    return (workdir / "checkpoints" / "reference").absolute()
