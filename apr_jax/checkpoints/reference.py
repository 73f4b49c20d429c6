"""The reference policy: what GRPO starts from and its KL term refers to. A run saves it once."""

import pathlib
import shutil
from typing import Any

import orbax.checkpoint as ocp

from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.parallel import hosts


def save_reference(workdir: pathlib.Path, params: Any) -> None:
    """Save the reference policy, unless there is one."""
    path = _folder(workdir)
    if not path.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, flatten(params))


def has_reference(workdir: pathlib.Path) -> bool:
    """Return True once the reference policy is saved: SFT is done, or a policy was given."""
    return _folder(workdir).exists()


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
        with ocp.StandardCheckpointer() as checkpointer:
            return unflatten(abstract, checkpointer.restore(path, flatten(abstract)))
    except Exception as error:  # as in `Checkpoints.restore`
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
